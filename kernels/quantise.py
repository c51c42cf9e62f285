from videoattn.kernels import quantised_reference


def quantise(q, k, v, *, pv, scale=None, kv_len=None, return_lse=False):
    return quantised_reference.quantise(q, k, v, pv=pv, scale=scale, kv_len=kv_len, return_lse=return_lse)


def quantise_streams(prologue, heads, *streams, pv, scale=None, kv_len=None, return_lse=False):
    return quantise(*prologue(heads, *streams), pv=pv, scale=scale, kv_len=kv_len, return_lse=return_lse)
