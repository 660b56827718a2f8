"""The Optimize screen as a file: well formed, alone, and with the numbers of Python wherever it computes."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import ArgumentError, DataFileError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.schedule import Clock
from sparsify.optimize.allocation import pruning_profile
from sparsify.optimize.layer_curves import LayerCurve
from sparsify.optimize.pruning_profiles import PruningSettings
from sparsify.optimize.screen import SCRIPTS, Report
from sparsify.optimize.stages import OriginalTraining, learning_rates
from sparsify.recipe.recipe import Recipe
from tests.screens import LEVELS, curve, report

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs node, to run the page's scripts")
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Reader(HTMLParser):
    """Every element that is opened is closed, in order; what is referred to is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.wanted: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "action", "data", "poster", "srcset"):
                self.references.append(value or "")
            if name in ("for", "aria-labelledby", "aria-describedby", "aria-controls"):
                self.wanted += (value or "").split()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def node(script: str, given: Any) -> Any:
    """What `script`, with the page's computing scripts before it, makes of `given`."""
    files = [resources.files("sparsify.optimize").joinpath(name).read_text() for name in SCRIPTS[:2]]
    read_in = "const given = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
    text = "\n".join([*files, read_in, f"process.stdout.write(JSON.stringify((() => {{ {script} }})()))"])
    done = subprocess.run(
        [str(NODE), "-e", text],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_page_is_well_formed_and_refers_to_nothing_outside() -> None:
    text = report().html()
    found = read(text)
    assert len(found.ids) == len(set(found.ids))
    assert set(found.wanted) <= set(found.ids)
    assert all(one.startswith(("#", "data:")) for one in found.references)
    assert all(one[1:] in found.ids for one in found.references if one.startswith("#"))
    # The name space of SVG is a name, not an address; fetching is forbidden by the page itself.
    assert set(re.findall(r"https?://[^\s\"'`<]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text and not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", text)
    assert not re.search(r"@(title|style|script|data|footer)@", text)


def test_the_data_is_read_back_whatever_is_in_a_name() -> None:
    nasty = "</script><!--<script>&amp;\u2028@style@"
    made = report()
    odd = replace(made, curves=(replace(made.curves[0], name=nasty), *made.curves[1:]))
    text = odd.html()
    read(text)
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    # Nothing in it can end the element, or begin a comment in it.
    assert not set("<>&") & set(match.group(1))
    data = json.loads(match.group(1))
    assert data["layers"][0]["name"] == nasty
    assert data == json.loads(json.dumps(odd.data()))


def test_a_model_name_is_text() -> None:
    made = report()
    odd = replace(made, analysis=replace(made.analysis, model="<b>&@data@"))
    assert '<h1 id="title">&lt;b&gt;&amp;@data@</h1>' in odd.html()


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert report().to_html(path) == path
    before = path.read_text(encoding="utf-8")
    assert before == report().html()
    broken = replace(report(), settings=PruningSettings(sparsity=85.0))
    with pytest.raises(ArgumentError, match=r"sparsity: 85\.0 is not a fraction"):
        broken.to_html(path)
    assert path.read_text(encoding="utf-8") == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataFileError, match="cannot write"):
        report().to_html(tmp_path / "missing" / "report.html")


def test_figures_that_are_no_numbers_are_refused() -> None:
    made = report()
    odd = replace(made, benchmarks={"dense": replace(made.benchmarks["dense"], latency_p50_ms=math.nan)})
    with pytest.raises(ArgumentError, match="no finite number"):
        odd.html()


def test_without_learning_rates_there_are_none() -> None:
    assert replace(report(), training=OriginalTraining(20)).data()["schedules"] == {}
    data = replace(report(), training=None).data()
    assert data["schedules"] == {} and data["training"]["known"] is False


def model(chance: random.Random) -> list[LayerCurve]:
    """Layers with noise, ties, zeros and other levels, as they come."""
    found = []
    for number in range(chance.randint(1, 12)):
        one = curve(number, chance)
        kind = chance.randrange(6)
        if kind == 0:
            one = replace(one, losses=(0.0,) * len(LEVELS))
        elif kind == 1:
            one = replace(one, losses=tuple(chance.choice([0.0, 0.5, 1.0]) for _ in LEVELS))
        elif kind == 2:
            one = replace(one, times=tuple(chance.uniform(0, 2) for _ in LEVELS))
        elif kind == 3:
            levels = tuple(step / 100 for step in range(100))
            one = replace(one, levels=levels, losses=tuple(x**3 for x in levels), times=tuple(1 - x for x in levels))
        elif kind == 4:
            one = replace(one, ms=0.0, times=(0.0,) * len(LEVELS), weights=chance.choice([0, 1, 2, 1000]))
        found.append(one)
    return found


@pytest.mark.parametrize(
    ("method", "name", "base"),
    [
        ("data", "loss", 0.25),
        ("fisher", "loss", None),
        ("magnitude", "sum of removed magnitudes", None),
        ("shape", "cost by shape", None),
    ],
)
def test_what_was_not_measured_is_not_called_loss(method: str, name: str, base: float | None) -> None:
    made = replace(report(), loss_method=method, loss_base=base)
    assert made.data()["lost"] == {"name": name, "base": base}


def asked(chance: random.Random, layers: list[LayerCurve]) -> PruningSettings:
    free = [one.name for one in layers if not one.why_not]
    by_hand = {name: chance.choice([0.0, 0.5, 0.87]) for name in free if chance.random() < 0.1}
    return PruningSettings(
        sparsity=chance.choice([0.0, 0.3, 0.5, 0.85, 0.95, 1.0, chance.random()]),
        balance=chance.choice([0.0, 0.25, 0.5, 1.0, chance.random()]),
        min_sparsity=chance.choice([0.0, 0.4, 0.7]),
        min_speedup=chance.choice([0.0, 1.2, 2.0]),
        min_recovery=chance.choice([0.0, 0.0, 0.5, 0.9]),
        max_sparsity=chance.choice([0.95, 0.8, 0.99]),
        first_layer=chance.random() < 0.5,
        grouped=chance.random() < 0.5,
        overrides=by_hand,
    )


@needs_node
def test_the_page_computes_what_python_computes() -> None:
    chance = random.Random(1)
    cases = []
    for _ in range(400):
        layers = model(chance)
        cases.append((layers, asked(chance, layers)))
    given = [{"layers": [asdict(one) for one in layers], "settings": asdict(wanted)} for layers, wanted in cases]
    answers = node("return given.map((one) => pruningProfile(one.layers, one.settings));", given)
    for (layers, wanted), answer in zip(cases, answers, strict=True):
        plain = asdict(pruning_profile(layers, wanted))
        for name, value in answer.items():
            if name == "layers":
                for here, there in zip(value, plain["layers"], strict=True):
                    assert here.keys() == there.keys()
                    for key, figure in there.items():
                        same = figure if isinstance(figure, str) else pytest.approx(figure, rel=1e-9, abs=1e-9)
                        assert here[key] == same
            elif name == "notes":
                assert len(value) == len(plain["notes"])
            else:
                assert value == pytest.approx(plain[name], rel=1e-9, abs=1e-9), name


@needs_node
def test_sums_are_rounded_once_as_in_python() -> None:
    chance = random.Random(2)
    lists = [[chance.uniform(-1, 1) * 10 ** chance.randint(-18, 18) for _ in range(30)] for _ in range(300)]
    lists += [[], [0.1] * 10, [1e16, 1.0, 1e-16], [1.0, 1e100, 1.0, -1e100]]
    # A large number comes back with fewer digits than a Python integer would have.
    found = [float(one) for one in node("return given.map(fsum);", lists)]
    assert found == [math.fsum(one) for one in lists]


@needs_node
def test_learning_rates_of_the_page_are_those_of_the_modifiers() -> None:
    data = report().data()
    epochs = [step / 7 for step in range(7 * 60)]
    each = "given.epochs.map((epoch) => learningRate(all, epoch))"
    script = f"return Object.values(given.schedules).map((all) => {each});"
    found = node(script, {"schedules": data["schedules"], "epochs": epochs})
    training = OriginalTraining(90, 0.1, 0.001)
    for name, rates in zip(data["schedules"], found, strict=True):
        modifiers = learning_rates(training, None if name == "suggested" else name)
        assert rates == pytest.approx([governing(modifiers, epoch) for epoch in epochs], rel=1e-9), name


@needs_node
@pytest.mark.parametrize(
    ("order", "expected"),
    [("set 0, step 0", "step"), ("step 0, set 0", "step"), ("set 5, step 0", "set"), ("step 5, set 0", "step")],
)
def test_one_schedule_governs_as_in_training(order: str, expected: str) -> None:
    rates = {"set": 0.5, "step": 0.25}
    modifiers = []
    for kind, start in (one.split() for one in order.split(", ")):
        fields: dict[str, Any] = {"start_epoch": float(start), "learning_rate": rates[kind]}
        if kind == "step":
            kwargs = {"step_size": 100, "gamma": 0.1}
            fields = {"start_epoch": float(start), "end_epoch": 90.0, "lr_class": "StepLR", "lr_kwargs": kwargs}
            fields["init_lr"] = rates[kind]
        name = {"set": "SetLearningRateModifier", "step": "LearningRateModifier"}[kind]
        modifiers.append({"type": name, "fields": fields})
    assert node("return learningRate(given, 10);", modifiers) == rates[expected]


def governing(modifiers: list[Modifier], epoch: float) -> float:
    clock = Clock(round(epoch * 7), epoch, 7)
    started = [one.rate() for one in modifiers if one.window.start <= epoch]  # type: ignore[attr-defined]
    latest = max(started, key=lambda one: (one.start, one.scheduled))
    return float(latest.value(clock))


@needs_node
def test_the_recipe_of_the_page_is_read_by_python() -> None:
    made = report()
    profile = asdict(pruning_profile(made.curves, made.settings))
    odd = {"layer1": "a-b.c d.weight", "layer2": "true", "layer4": 'quo"te: #x', "layer5": "x\u2028y"}
    script = """
      const when = {start: 1, end: 31.5, frequency: 1e-7, first: 0.05};
      const pruning = pruningModifiers(given.profile, given.weights, when, (choice) => `loss\\n- !Evil ${choice.name}`);
      return recipeText(["made\\nmodifiers: []"], [...pruning, ...given.rates, ...given.last]);
    """
    data = made.data()
    weights = {**data["weights"], **odd}
    given = {"profile": profile, "weights": weights, "rates": data["schedules"]["multi-step"], "last": data["last"]}
    recipe = Recipe.from_yaml(node(script, given))
    pruned = [one for one in recipe.modifiers if type(one).__name__ == "GMPruningModifier"]
    found = {name: one.final_sparsity for one in pruned for name in one.params}  # type: ignore[attr-defined]
    shares = {weights[one["name"]]: round(one["sparsity"], 4) for one in profile["layers"] if one["sparsity"] > 0}
    assert found == pytest.approx(shares, abs=1e-12)
    assert all(one.update_frequency == 1e-7 and one.end_epoch == 31.5 for one in pruned)
    rates = learning_rates(OriginalTraining(90, 0.1, 0.001), "multi-step")
    read_rates = [one for one in recipe.modifiers if one.kind == "learning_rate"]
    assert sorted(read_rates, key=str) == sorted(rates, key=str)


def test_files_of_the_page_are_carried_by_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    folder = resources.files("sparsify.optimize")
    names = {Path(str(one)).name for one in folder.iterdir() if Path(str(one)).suffix in (".js", ".css", ".html")}
    assert names == {*SCRIPTS, "screen.html", "screen.css"}
    assert '"sparsify.optimize" = ["*.html", "*.css", "*.js"]' in text


def test_the_layers_of_a_report_are_those_of_its_profiles() -> None:
    from sparsify.analysis.loss import LossProfile

    made = report(3)
    losses = {one.name: (0.0, 1.0, 3.0) for one in made.curves}
    loss = LossProfile("data", "pruning", (0.0, 0.5, 0.9), losses, 0.0, 8)
    found = Report.of(made.analysis, loss, training=made.training)
    assert [one.name for one in found.curves] == ["layer0", "layer1", "layer2"]
    assert found.data()["loss"] == "measured on data, one layer at a time" and not found.data()["timed"]
