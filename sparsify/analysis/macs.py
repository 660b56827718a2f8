"""Multiply-accumulates of one operator, from the shapes that it is called with.

The convention: only products that are summed up count, those of convolutions, linear layers, matrix products, attention
and recurrent layers. Biases, norms, activations, pools and residual adds count nothing, a table that is looked up
neither. An operator that is neither known to multiply nor known not to is unknown, and never 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__: list[str] = []

TensorShape = tuple[int, ...]


@dataclass(frozen=True)
class CountedOperand:
    """A tensor that an operator reads.

    Attributes:
        parameter: the clean name of the parameter that it is, perhaps moved; None for any other tensor.
    """

    shape: TensorShape
    parameter: str | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Cost:
    """The factors of an operator, and its MACs.

    Attributes:
        macs: multiply-accumulates.
        factors: the tensors that are multiplied, in the order of the arguments; biases and masks are none.
        groups: of a convolution.
        recurrent: whether the cost is that of several weights, each with its share by size.
    """

    macs: int
    factors: tuple[CountedOperand, ...]
    groups: int = 1
    recurrent: bool = False


def operation_cost(operator: str, args: Sequence[Any], output: TensorShape) -> Cost | None:
    """The cost of a call; None for an operator that multiplies nothing that is known here.

    Args:
        operator: its name without the namespace "aten", overload and the "_" of in-place ones.
        args: positional arguments, with a `CountedOperand` in the place of each tensor.
        output: the shape of the first tensor that it gives.

    A depthwise convolution of 8 channels and a full one, both 3x3 to 30x30:

    >>> operation_cost("conv2d", [CountedOperand((1, 8, 32, 32)), CountedOperand((8, 1, 3, 3))], (1, 8, 30, 30)).macs
    64800
    >>> operation_cost("conv2d", [CountedOperand((1, 3, 32, 32)), CountedOperand((8, 3, 3, 3))], (1, 8, 30, 30)).macs
    194400
    """
    rule = _RULES.get(operator)
    return None if rule is None else rule(args, output)


def _convolution_cost(args: Sequence[Any], output: TensorShape) -> Cost:
    x, weight = args[0], args[1]
    # weight: (out, in / groups, ...). Every output is a sum over one of its rows.
    channels = x.shape[-(len(weight.shape) - 1)]
    return Cost(math.prod(output) * math.prod(weight.shape[1:]), (x, weight), max(1, channels // weight.shape[1]))


def _either_convolution(args: Sequence[Any], output: TensorShape) -> Cost:
    # aten.convolution, which all convolutions become, has an argument for it.
    return (_transposed if args[6] else _convolution_cost)(args, output)


def _transposed(args: Sequence[Any], output: TensorShape) -> Cost:
    x, weight = args[0], args[1]
    # weight: (in, out / groups, ...). Every input is spread by one of its rows.
    channels = output[-(len(weight.shape) - 1)]
    return Cost(x.size * math.prod(weight.shape[1:]), (x, weight), max(1, channels // weight.shape[1]))


def _linear(args: Sequence[Any], output: TensorShape) -> Cost:
    return Cost(math.prod(output) * args[1].shape[-1], (args[0], args[1]))


def _product_cost(first: int = 0) -> Callable[[Sequence[Any], TensorShape], Cost]:
    def rule(args: Sequence[Any], output: TensorShape) -> Cost:
        a, b = args[first], args[first + 1]
        return Cost(math.prod(output) * a.shape[-1], (a, b))

    return rule


def _batches_summed(args: Sequence[Any], output: TensorShape) -> Cost:
    # addbmm: the products of a batch are added to one another.
    a, b = args[1], args[2]
    return Cost(a.size * b.shape[-1], (a, b))


def _grouped_cost(args: Sequence[Any], output: TensorShape) -> Cost:
    # Groups are parts of an axis of a 2-d factor, and the batch of a 3-d one: no product spans two of them.
    a, b = args[0], args[1]
    rows = a.shape[-2] if len(b.shape) == 2 and len(a.shape) == 3 else a.size // a.shape[-1]
    return Cost(rows * a.shape[-1] * b.shape[-1], (a, b))


def _dot(args: Sequence[Any], output: TensorShape) -> Cost:
    return Cost(args[0].size, (args[0], args[1]))


def _tensordot(args: Sequence[Any], output: TensorShape) -> Cost:
    a, b, dims = args[0], args[1], args[2]
    return Cost(math.prod(output) * math.prod(a.shape[dim] for dim in dims), (a, b))


def _attention_cost(args: Sequence[Any], output: TensorShape) -> Cost:
    q, k, v = args[:3]
    # Masked or causal positions are multiplied all the same.
    return Cost(math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1]), (q, k, v))


def _bilinear(args: Sequence[Any], output: TensorShape) -> Cost:
    a, weight, b = (args[0], args[1], args[2]) if len(args[1].shape) == 3 else (args[0], args[2], args[1])
    rows = math.prod(output[:-1])
    return Cost(rows * (weight.size + weight.shape[0] * weight.shape[2]), (a, weight, b))


def _einsum(args: Sequence[Any], output: TensorShape) -> Cost:
    operands: Sequence[CountedOperand] = args[1]
    return Cost(einsum_macs(args[0], [operand.shape for operand in operands]), tuple(operands))


def einsum_macs(equation: str, shapes: Sequence[TensorShape]) -> int:
    """Taken pairwise from the left; a pair whose product sums nothing is pointwise and free.

    >>> einsum_macs("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]), einsum_macs("i,j->ij", [(3,), (4,)])
    (120, 0)
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms: list[list[str]] = []
    sizes: dict[str, int] = {}
    for term, shape in zip(left.split(","), shapes, strict=True):
        head, dots, tail = term.partition("...")
        hidden = len(shape) - len(head) - len(tail) if dots else 0
        # Named from the right: that is how shapes of different length are broadcast.
        labels = [*head, *(f"...{hidden - i}" for i in range(hidden)), *tail]
        terms.append(labels)
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    seen = Counter(label for term in terms for label in term)
    if arrow:
        head, dots, tail = result.partition("...")
        kept = {*head, *tail, *(label for label in sizes if dots and label.startswith("..."))}
    else:
        kept = {label for label, number in seen.items() if number == 1 or label.startswith("...")}
    macs, running = 0, set(terms[0])
    for index, labels in enumerate(terms[1:], 1):
        needed = kept.union(*terms[index + 1 :])
        # An index that only one factor has, and the result has not, is summed before the product.
        both = {label for label in running.union(labels) if label in needed or label in running & set(labels)}
        if both - needed:
            macs += math.prod(sizes[label] for label in both)
        running = both & needed
    return macs


def _recurrent(weights: Callable[[Sequence[Any]], Sequence[Any]]) -> Callable[[Sequence[Any], TensorShape], Cost]:
    def rule(args: Sequence[Any], output: TensorShape) -> Cost:
        # Every weight is multiplied once by each step of each sequence; 1-d parameters are biases.
        found = [weight for weight in weights(args) if isinstance(weight, CountedOperand) and len(weight.shape) == 2]
        steps = math.prod(args[0].shape[:-1])
        return Cost(steps * sum(weight.size for weight in found), (args[0], *found), recurrent=True)

    return rule


def _lookup(table: int) -> Callable[[Sequence[Any], TensorShape], Cost]:
    return lambda args, output: Cost(0, (args[1 - table], args[table]))


def _layer_of_cells(args: Sequence[Any]) -> Sequence[Any]:
    # Of packed sequences the parameters stand behind the batch sizes and the state.
    parameters: Sequence[Any] = args[3] if isinstance(args[3], list | tuple) else args[2]
    return parameters


_CELLS = _recurrent(lambda args: args[2:4])
_RULES: dict[str, Callable[[Sequence[Any], TensorShape], Cost]] = {
    **dict.fromkeys(
        (
            *(
                "conv1d",
                "conv2d",
                "conv3d",
                "cudnn_convolution",
                "cudnn_convolution_relu",
                "cudnn_convolution_add_relu",
            ),
            *("mkldnn_convolution", "miopen_convolution", "_mps_convolution", "thnn_conv2d", "_slow_conv2d_forward"),
            *("slow_conv3d", "slow_conv3d_forward", "slow_conv_dilated2d", "slow_conv_dilated3d"),
            *("_conv_depthwise2d", "conv_depthwise3d", "miopen_depthwise_convolution"),
            "torchvision::deform_conv2d",
        ),
        _convolution_cost,
    ),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), _either_convolution),
    **dict.fromkeys(
        (
            *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "slow_conv_transpose2d"),
            *("slow_conv_transpose3d", "cudnn_convolution_transpose", "miopen_convolution_transpose"),
        ),
        _transposed,
    ),
    **dict.fromkeys(("linear", "mkldnn_linear", "inner"), _linear),
    **dict.fromkeys(("mm", "bmm", "matmul", "mv", "_scaled_mm", "_int_mm", "linalg_matmul"), _product_cost()),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "_addmm_activation"), _product_cost(1)),
    "addbmm": _batches_summed,
    "_grouped_mm": _grouped_cost,
    **dict.fromkeys(("dot", "vdot", "linalg_vecdot"), _dot),
    "tensordot": _tensordot,
    "einsum": _einsum,
    **dict.fromkeys(("bilinear", "_trilinear"), _bilinear),
    **dict.fromkeys(
        (
            "scaled_dot_product_attention",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
            "_scaled_dot_product_attention_math",
        ),
        _attention_cost,
    ),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent(_layer_of_cells)),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _CELLS),
    "mkldnn_rnn_layer": _recurrent(lambda args: args[1:3]),
    "_cudnn_rnn": _recurrent(lambda args: args[1]),
    "embedding": _lookup(0),
    **dict.fromkeys(("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"), _lookup(0)),
}

_OPERATION_WORDS = """
__and__ __iand__ __ilshift__ __ior__ __irshift__ __ixor__ __lshift__ __or__ __rshift__ __xor__ _adaptive_avg_pool2d
_adaptive_avg_pool3d _add_relu _aminmax _assert_async _assert_scalar _assert_tensor_metadata _backward
_batch_norm_impl_index _batch_norm_no_update _batch_norm_with_update _cast_Double _cast_Float _cast_Half _cast_Int
_cast_Long _chunk_cat _cummax_helper _cummin_helper _fake_quantize_learnable_per_channel_affine
_fake_quantize_per_tensor_affine_cachemask_tensor_qparams _functional_assert_async _functional_assert_scalar
_fused_dropout _fused_moving_avg_obs_fq_helper _fused_rms_norm _index_put_impl _is_all_true _is_any_true _lazy_clone
_local_scalar_dense _log_softmax _logcumsumexp _masked_softmax _native_batch_norm_legit
_native_batch_norm_legit_functional _native_batch_norm_legit_no_training _pack_padded_sequence _pad_circular _pad_enum
_pad_packed_sequence _pin_memory _prelu_kernel _reshape_alias _reshape_copy _safe_softmax _shape_as_tensor _softmax
_stack _thnn_fused_gru_cell _thnn_fused_lstm_cell _to_copy _unique _unique2 _unsafe_index _unsafe_index_put
_unsafe_masked_index _unsafe_masked_index_put_accumulate _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
_upsample_lanczos2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm
_weight_norm_interface abs absolute adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d addr affine_grid_generator all allclose alpha_dropout amax amin aminmax any
arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere as_strided
as_strided_scatter atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d batch_norm batch_norm_elemt
batch_norm_stats bernoulli binary_cross_entropy binary_cross_entropy_with_logits bincount block_diag broadcast_tensors
bucketize cartesian_prod cat channel_shuffle clone col2im column_stack combinations complex concat concatenate
constant_pad_nd copy copysign cosine_similarity count_nonzero cross cross_entropy_loss cudnn_affine_grid_generator
cudnn_batch_norm cudnn_grid_sampler cummax cummin cumprod cumsum cumulative_trapezoid data dequantize detach diag
diag_embed diagflat diagonal_copy diagonal_scatter diff dim dist divide dropout dstack embedding_renorm empty
empty_like empty_permuted eq equal exponential eye fake_quantize_per_channel_affine
fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask
feature_alpha_dropout feature_dropout fill fill_diagonal fix flip fliplr flipud floor_divide frac
fractional_max_pool2d fractional_max_pool3d frobenius_norm full full_like fused_moving_avg_obs_fake_quant gather gcd
ge gelu ger get_device glu gradient greater greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm gt
hardswish heaviside histc hstack huber_loss im2col index index_add index_copy index_fill index_put index_reduce
index_select instance_norm is_complex is_contiguous is_floating_point is_nonzero isclose isin item kl_div kron
kthvalue l1_loss layer_norm lcm le less less_equal lift lift_fresh linalg_cross linalg_norm linalg_vector_norm
linspace log_sigmoid log_sigmoid_forward log_softmax logcumsumexp logspace logsumexp lt masked_fill masked_scatter
masked_select max max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d
max_pool3d_with_indices max_unpool2d max_unpool3d mean median meshgrid min miopen_batch_norm mish mkldnn_max_pool2d
mode mse_loss msort multinomial multiply nan_to_num nanmean nanmedian nanquantile nansum native_batch_norm
native_channel_shuffle native_dropout native_group_norm native_layer_norm ne negative new_empty new_empty_strided
new_full new_ones new_zeros nll_loss nll_loss2d nll_loss2d_forward nll_loss_forward nonzero nonzero_numpy
nonzero_static norm norm_except_dim normal not_equal nuclear_norm numel numpy_T one_hot ones ones_like outer pad
pad_sequence pairwise_distance pixel_shuffle pixel_unshuffle poisson polar prelu prod put quantile
quantize_per_channel quantize_per_tensor rand rand_like randint randint_like randn randn_like random randperm range
reflection_pad1d reflection_pad2d reflection_pad3d relu6 renorm repeat repeat_interleave replication_pad1d
replication_pad2d replication_pad3d resize resize_as rms_norm roll rot90 row_stack rrelu rrelu_with_noise rsub
scalar_tensor scatter scatter_add scatter_reduce searchsorted segment_reduce select_scatter set size slice_scatter
smooth_l1_loss softmax sort special_digamma special_erf special_erfc special_erfinv special_exp2 special_expit
special_expm1 special_gammaln special_i0 special_log1p special_log_softmax special_logit special_logsumexp
special_ndtr special_round special_sinc special_softmax special_xlogy split_copy split_with_sizes_copy squeeze stack
std std_mean stride subtract sum sum_to_size swapaxes swapdims sym_numel sym_size sym_storage_offset sym_stride t take
take_along_dim tensor_split threshold tile to_dense topk torchvision::nms torchvision::ps_roi_align
torchvision::ps_roi_pool torchvision::roi_align torchvision::roi_pool trace transpose trapezoid trapz tril
tril_indices triu triu_indices true_divide type_as unflatten unfold uniform unique_consecutive unique_dim unsafe_chunk
unsafe_split unsafe_split_with_sizes unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d vander var var_mean view_copy vstack
where xlogy zero zeros zeros_like
"""
FREE_OPERATIONS = frozenset(_OPERATION_WORDS.split())
"""Moves, reductions, norms, pools, comparisons, constants: of those that torch does not tag as pointwise or views."""
