"""What the time of an operator counts as.

Operators are on closed lists: what is on none is "other", which a report counts as unnamed. Names are those of torch's
dispatcher without namespace and overload, of the outermost operator under a module (`linear`) as a trace has it, or of the
innermost (`addmm`) as a dispatch mode has it.
"""

from __future__ import annotations

import re

from videoattn.call import KINDS

ATTENTION = "attention"  # of a kind that is not known
OPERATORS = (
    *KINDS,
    ATTENTION,
    "convolution",
    "linear",
    "normalisation",
    "prologue",
    "elementwise",
    "layout",
    "transfer",
    "fused",
    "host",
    "other",
)
"""What a row's time went to. The kinds of attention, then:

prologue    kernels of ours before attention: norm and rotation of q and k in one pass, and quantisation
layout      copies that change order, dtype or place in memory on one device; cat, padding, gathering
transfer    copies between host and device
fused       kernels that a compiler made of several operators
host        a CPU: Python between the operators. A GPU: it waits for the host
"""

LABELS = {
    "spatial": "spatial self-attention",
    "temporal": "temporal self-attention",
    "full": "full 3-D self-attention",
    "cross": "text/image cross-attention",
    "joint": "joint attention",
    "text": "text self-attention",
    "audio": "audio self-attention",
    ATTENTION: "attention of unknown kind",
    "prologue": "norm, rotation, quantisation in one pass",
    "layout": "layout copies",
    "transfer": "host-device copies",
    "fused": "fused by the compiler",
    "host": "host gaps",
    "text_encoder": "text encoder",
    "image_encoder": "image encoder",
    "vae.encode": "VAE encode",
    "vae.decode": "VAE decode",
}
"""How a category is written where its name is not enough."""

UNNAMED = ("other", ATTENTION)

PROLOGUE = "prologue"
PROLOGUE_KERNELS = frozenset(("_prepare", "_statistics", "_operands"))
"""Of kernels/prepare.py and kernels/quantise.py, which are launched inside of an attention call."""

_SDPA = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_native_multi_head_attention",
    "flex_attention",
)
SDPA = frozenset(_SDPA)
SDPA_BACKENDS = {
    "_scaled_dot_product_flash_attention": "sdpa_flash",
    "_scaled_dot_product_flash_attention_for_cpu": "sdpa_cpu",
    "_scaled_dot_product_efficient_attention": "sdpa_efficient",
    "_scaled_dot_product_cudnn_attention": "sdpa_cudnn",
    "_scaled_dot_product_attention_math": "sdpa_math",
}

_LISTS: dict[str, str] = {
    "convolution": """
        conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d mkldnn_convolution
        cudnn_convolution cudnn_convolution_transpose miopen_convolution slow_conv3d_forward slow_conv3d conv_depthwise3d
        _conv_depthwise2d _slow_conv2d_forward thnn_conv2d _nnpack_spatial_convolution
    """,
    "linear": """
        linear addmm mm bmm baddbmm matmul einsum addbmm mv addmv dot outer ger mkldnn_linear _addmm_activation _int_mm
        _scaled_mm _weight_int8pack_mm _weight_int4pack_mm bilinear tensordot
    """,
    "normalisation": """
        layer_norm native_layer_norm group_norm native_group_norm rms_norm _fused_rms_norm batch_norm native_batch_norm
        _batch_norm_impl_index cudnn_batch_norm instance_norm normalize norm linalg_vector_norm weight_norm
    """,
    "elementwise": """
        add add_ sub sub_ rsub mul mul_ div div_ neg neg_ pow pow_ square sqrt sqrt_ rsqrt rsqrt_ reciprocal exp exp_ exp2
        expm1 log log2 log1p sin sin_ cos cos_ tan tanh tanh_ atan2 sigmoid sigmoid_ silu silu_ gelu gelu_ relu relu_ relu6
        leaky_relu leaky_relu_ elu softplus mish hardswish hardtanh glu clamp clamp_ clamp_min clamp_max clip maximum minimum
        abs abs_ sign floor ceil round round_ trunc fmod remainder floor_divide lerp lerp_ addcmul addcmul_ addcdiv
        where masked_fill masked_fill_ eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or
        bitwise_not __and__ __or__ isnan isinf isfinite nan_to_num nan_to_num_ sum mean std var var_mean std_mean prod amax
        amin max min argmax argmin any all cumsum cumprod cummax sort argsort topk searchsorted bucketize unique
        softmax _softmax log_softmax _log_softmax logsumexp complex polar view_as_complex view_as_real real imag
        dropout native_dropout feature_dropout threshold count_nonzero nonzero nonzero_numpy equal allclose isclose quantile median histc erf erfinv
        _foreach_add _foreach_mul fft_fft fft_ifft fft_fftn fft_ifftn fft_rfft fft_irfft _fft_r2c _fft_c2c _fft_c2r
        rand randn rand_like randn_like randint normal normal_ uniform_ bernoulli_ random_ exponential_ randperm
        avg_pool1d avg_pool2d avg_pool3d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d upsample_linear1d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa grid_sampler grid_sampler_2d affine_grid_generator
    """,
    "layout": """
        copy_ _to_copy to type_as float half double bfloat16 contiguous clone cat concat concatenate stack hstack vstack pad
        constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d _pad_circular repeat repeat_interleave tile expand expand_as view reshape flatten unflatten permute
        transpose t transpose_ numpy_T movedim moveaxis swapaxes swapdims squeeze squeeze_ unsqueeze unsqueeze_ split
        split_with_sizes chunk tensor_split unbind narrow slice select index index_select index_put index_put_ _index_put_impl_
        index_copy index_copy_ index_fill_ index_add_ gather scatter scatter_ scatter_add_ masked_select masked_scatter take
        take_along_dim embedding flip roll rot90 tril triu diag diagonal diag_embed as_strided as_strided_ unfold unfold_copy
        pixel_shuffle pixel_unshuffle channel_shuffle col2im im2col upsample_nearest1d upsample_nearest2d upsample_nearest3d
        _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d fill_ zero_ zeros ones full zeros_like
        ones_like full_like new_zeros new_ones new_full new_empty new_empty_strided empty empty_like empty_strided
        empty_permuted arange linspace logspace eye meshgrid cartesian_prod scalar_tensor lift_fresh lift detach detach_ alias
        _reshape_alias _unsafe_view view_copy resize_ set_ set_data broadcast_tensors broadcast_to atleast_1d atleast_2d
        result_type resolve_conj resolve_neg _conj tensor one_hot triu_indices tril_indices combinations block_diag align_to
    """,
    "transfer": "item _local_scalar_dense is_nonzero pin_memory _pin_memory is_pinned record_stream",
}

_OF_OP: dict[str, str] = {op: operator for operator, ops in _LISTS.items() for op in ops.split()}

_KERNELS = (  # kernels that no operator surrounds: (pattern of the name, operator), the first that fits
    (re.compile(r"^triton_(?!tem)", re.IGNORECASE), "fused"),  # named after the operators in it, attention among them
    (re.compile(r"flash|fmha|sdpa|attention|mha", re.IGNORECASE), ATTENTION),
    (re.compile(r"conv|fprop|implicit|winograd", re.IGNORECASE), "convolution"),
    (re.compile(r"gemm|cutlass|nvjet|cublas|splitK|_mm_|bmm", re.IGNORECASE), "linear"),
    (re.compile(r"^triton_|^graph_\d+_cpp|^cpp_fused", re.IGNORECASE), "fused"),
    (re.compile(r"norm", re.IGNORECASE), "normalisation"),
    (re.compile(r"copy|cat|memcpy|memset|transpose|nchw|nhwc", re.IGNORECASE), "layout"),
    (re.compile(r"elementwise|reduce|softmax|vectorized", re.IGNORECASE), "elementwise"),
)

CONVOLUTION, LINEAR, NORMALISATION = "convolution", "linear", "normalisation"
_UNFUSED = frozenset(("bmm", "baddbmm", "matmul", "softmax", "_softmax", "einsum", "_safe_softmax"))


def bare(op: str) -> str:
    """ "aten::add_" and "aten.add_.Tensor" as "add_"; other namespaces stay.

    >>> bare("aten::add_"), bare("aten.add.Tensor"), bare("videoattn::attend")
    ('add_', 'add', 'videoattn::attend')
    """
    if op.startswith("aten::"):
        return op[6:]
    if op.startswith("aten."):
        return op[5:].split(".")[0]
    return op


def operator_of(op: str, role: str, kind: str) -> str:
    """What an operator counts as.

    Args:
        op: its bare name.
        role: of the innermost module around it: "attention", "normalisation", "convolution", "linear" or "".
        kind: of the attention module that is innermost around it, at whatever depth; "" where there is none.
    """
    if op in SDPA or op == "videoattn::attend" or (role == ATTENTION and op in _UNFUSED):
        return kind or ATTENTION
    operator = _OF_OP.get(op) or (operator_of_kernel(op) if _foreign(op) else "other")
    if operator == ATTENTION:
        return kind or ATTENTION
    if role == NORMALISATION and operator in ("elementwise", "layout", "other"):
        return NORMALISATION  # a norm written out in small operators
    return operator


def _foreign(op: str) -> bool:
    """Whether an operator is another library's, or a kernel of a compiler: its name is all that is known of it."""
    return "::" in op or op.startswith("triton_")


def operator_of_kernel(name: str) -> str:
    """What a GPU kernel counts as that no operator surrounds, or an operator of another library."""
    return next((operator for pattern, operator in _KERNELS if pattern.search(name)), "other")


_WHOLE = re.compile(r"(text_encoder|image_encoder|scheduler)(_\d+)?$|(audio_)?vae\.(encode|decode)$")


def category(stage: str, operator: str) -> str:
    """The category of a row: some stages count as a whole, the rest by operator."""
    if operator == "host":
        return "host"
    match = _WHOLE.match(stage)
    if not match:
        return operator
    return match.group(1) or stage.removeprefix("audio_")


def label(category: str) -> str:
    return LABELS.get(category, category)
