"""`sparsify doctor`: the versions, the processor and the threads that results and speed depend on."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from sparsify.errors import DISTRIBUTION, first_line
from sparsify.output.tables import Column, Table

__all__: list[str] = []

INT8_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX512-VNNI",
    "amx_int8": "AMX int8",
    "asimddp": "Arm dot product",
    "i8mm": "Arm int8 matrix products",
}
"""Flags of /proc/cpuinfo that onnxruntime's int8 kernels look for, and what makers call them."""
OPTIONAL = ["rich", "matplotlib", "safetensors", "transformers", "accelerate", "lightning", "pytorch-lightning", "timm"]
OPTIONAL += ["pillow", "scipy", "faster-coco-eval", "tensorboard"]


@dataclass(frozen=True)
class Package:
    """One installed package, or one that is missing."""

    name: str
    version: str | None
    """None where it is not installed."""
    needed: str
    """The lowest version that works, or "optional"."""


@dataclass(frozen=True)
class Diagnosis:
    """The state of an installation and its machine."""

    version: str
    """Of sparsify."""
    folder: str
    python: str
    system: str
    processor: str
    int8_features: tuple[str, ...] | None
    """The processor's instructions for int8; None where the system does not tell."""
    exact_int8: bool | None
    """True where onnxruntime adds products of int8 exactly without `session.x64quantprecision`; None: it failed."""
    cores: int
    """Those that this process may use."""
    torch_threads: int | None
    omp_num_threads: str | None
    cuda: str | None
    """The name of the first CUDA device."""
    packages: tuple[Package, ...]
    problems: tuple[str, ...]
    """What has to be mended, each with the way out."""
    notes: tuple[str, ...]
    """What is good to know."""

    def __str__(self) -> str:
        features = "unknown" if self.int8_features is None else ", ".join(self.int8_features) or "none of those known"
        exact = {True: "yes", False: "no", None: "could not be tried"}[self.exact_int8]
        facts = [
            ("sparsify", f"{self.version} in {self.folder}"),
            ("Python", self.python),
            ("system", self.system),
            ("processor", self.processor),
            ("instructions for int8", features),
            ("int8 sums exact by default", exact),
            ("cores for this process", str(self.cores)),
            ("threads of torch", "unknown" if self.torch_threads is None else str(self.torch_threads)),
            ("OMP_NUM_THREADS", self.omp_num_threads or "not set"),
            ("CUDA device", self.cuda or "none"),
        ]
        width = max(len(name) for name, _ in facts)
        columns = [Column("name", "Package"), Column("version", "Installed"), Column("needed", "Needed")]
        rows = [asdict(package) | {"version": package.version or "missing"} for package in self.packages]
        parts = ["\n".join(f"{name:<{width}}  {value}" for name, value in facts)]
        parts += [Table.of("Packages", rows, columns).text()]
        parts += ["\n".join(f"note: {note}" for note in self.notes)] if self.notes else []
        parts += ["\n".join(f"problem: {p}" for p in self.problems) if self.problems else "No problems found."]
        return "\n\n".join(parts)


def run_doctor(arguments: Namespace) -> int:
    """Prints what was found; exit code 1 where something has to be mended."""
    found = diagnose()
    print(json.dumps(asdict(found), indent=2) if arguments.json else str(found))
    return 1 if found.problems else 0


def diagnose() -> Diagnosis:
    """Looks at this process, its packages and its processor; takes seconds, since torch is imported."""
    import sparsify

    needed, problems, notes = _floors(), [], []
    other = other_product()
    if other is not None:
        problems.append(other)
    if not needed:
        notes.append(f"{DISTRIBUTION} runs from its source folder and is not installed: versions were not compared.")
    packages = []
    for name, floor in needed.items():
        version = _version(name)
        packages.append(Package(name, version, f">= {floor}"))
        if version is None:
            problems.append(f'{name} is not installed: pip install "{name}>={floor}"')
        elif _release(version) < _release(floor):
            problems.append(f'{name} {version} is older than {floor}: pip install --upgrade "{name}>={floor}"')
    packages += [Package(name, _version(name), "optional") for name in OPTIONAL]

    features = _int8_features()
    exact, failure = _exact_int8()
    if failure:
        problems.append(f"onnxruntime cannot run a product of int8: {failure}")
    if exact is False:
        notes.append(
            "this processor adds products of int8 in 16 bits, where they saturate: give onnxruntime the session option "
            "session.x64quantprecision=1, or train with reduce_range."
        )
    threads, cuda, failure = _torch()
    if failure:
        problems.append(f"torch cannot be imported: {failure}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is not None and threads > cores:
        notes.append(f"torch uses {threads} threads on {cores} cores; OMP_NUM_THREADS={cores} is faster.")
    return Diagnosis(
        version=sparsify.__version__,
        folder=str(Path(sparsify.__file__).parent),
        python=f"{platform.python_version()} ({sys.executable})",
        system=platform.platform(),
        processor=_processor(),
        int8_features=features,
        exact_int8=exact,
        cores=cores,
        torch_threads=threads,
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        cuda=cuda,
        packages=tuple(packages),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def other_product() -> str | None:
    """A line about Neural Magic's package `sparsify` where that is installed too; None where it is not.

    It has the same import name: whichever of the two was installed last has overwritten files of the other.
    """
    try:
        about = metadata.metadata("sparsify")
    except metadata.PackageNotFoundError:
        return None
    said = " ".join(about[key] for key in ("Author", "Home-page") if key in about)
    if "neuralmagic" not in said.lower().replace(" ", ""):
        return None
    return (
        f"another product, sparsify {about['Version']} by Neural Magic, is installed too and has the same import "
        f"name: pip uninstall sparsify, then pip install --force-reinstall --no-deps {DISTRIBUTION}"
    )


def _floors() -> Mapping[str, str]:
    """{package: lowest version} of what this distribution needs in any case."""
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w.-]+)[^;]*>=\s*([\d.]+)", line) for line in required if "extra ==" not in line)
    return {match[1]: match[2] for match in found if match}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The release of a version as numbers.

    >>> _release("2.13.0+cpu") < _release("2.6")
    False
    """
    release = re.match(r"[\d.]*", version)
    return tuple(int(part) for part in (release[0] if release else "").split(".") if part)


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _processor() -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def _int8_features() -> tuple[str, ...] | None:
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    if flags is None:
        return None
    has = set(flags[1].split())
    return tuple(name for flag, name in INT8_FEATURES.items() if flag in has)


def _exact_int8() -> tuple[bool | None, str]:
    """Tries one product of uint8 and int8 whose pairs exceed 16 bits; the answer, and why there is none."""
    try:
        import numpy as np
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        weights = numpy_helper.from_array(np.full((64, 64), 127, np.int8), "w")
        graph = helper.make_graph(
            [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, (4, 64))],
            [helper.make_tensor_value_info("y", TensorProto.INT32, (4, 64))],
            [weights],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (sums,) = session.run(None, {"x": np.full((4, 64), 255, np.uint8)})
        return bool((sums == 64 * 255 * 127).all()), ""
    except Exception as error:  # a broken installation raises anything
        return None, first_line(error)


def _torch() -> tuple[int | None, str | None, str]:
    """Threads, the CUDA device, and why torch could not be asked."""
    try:
        import torch

        return torch.get_num_threads(), torch.cuda.get_device_name(0) if torch.cuda.is_available() else None, ""
    except Exception as error:  # a broken installation raises anything
        return None, None, first_line(error)
