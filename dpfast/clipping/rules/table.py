"""Which rule stands for which function."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast.clipping.rules.attention import multi_head_attention
from dpfast.clipping.rules.convolution import conv, conv_transpose
from dpfast.clipping.rules.elementwise import (
    add,
    addcmul,
    cat,
    divide,
    divide_in_place,
    divide_reflected,
    lerp,
    lerp_in_place,
    masked_fill,
    multiply,
    multiply_in_place,
    prelu,
    stack,
    subtract,
    subtract_reflected,
    where,
    where_method,
)
from dpfast.clipping.rules.linear import add_product, bilinear, einsum, linear, matmul, matmul_reflected, tensordot
from dpfast.clipping.rules.norms import (
    batch_norm,
    fake_quant,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
    torch_batch_norm,
    torch_instance_norm,
)
from dpfast.clipping.rules.recurrent import gru_cell, lstm_cell, relu_cell, tanh_cell
from dpfast.clipping.rules.tables import embedding, embedding_bag, getitem, index_select, torch_embedding
from dpfast.clipping.tape import Rule

RULES: dict[Any, Rule] = {
    F.linear: linear,
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), matmul
    ),
    **dict.fromkeys((torch.mv, Tensor.mv), matmul),
    Tensor.__rmatmul__: matmul_reflected,
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), add_product),
    torch.einsum: einsum,
    torch.tensordot: tensordot,
    F.bilinear: bilinear,
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), conv),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), conv_transpose),
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.instance_norm: instance_norm,
    torch.instance_norm: torch_instance_norm,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.batch_norm: batch_norm,
    torch.batch_norm: torch_batch_norm,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    torch.fused_moving_avg_obs_fake_quant: fake_quant,
    torch.embedding: torch_embedding,
    Tensor.__getitem__: getitem,
    **dict.fromkeys((torch.index_select, Tensor.index_select), index_select),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__), subtract),
    **dict.fromkeys((Tensor.__rsub__, torch.rsub), subtract_reflected),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), multiply),
    **dict.fromkeys((Tensor.mul_, Tensor.__imul__), multiply_in_place),
    **dict.fromkeys((torch.div, Tensor.div, torch.true_divide, Tensor.true_divide, Tensor.__truediv__), divide),
    **dict.fromkeys((Tensor.div_, Tensor.__itruediv__), divide_in_place),
    Tensor.__rtruediv__: divide_reflected,
    **dict.fromkeys((torch.lerp, Tensor.lerp), lerp),
    Tensor.lerp_: lerp_in_place,
    **dict.fromkeys((torch.addcmul, Tensor.addcmul), addcmul),
    torch.where: where,
    Tensor.where: where_method,
    **dict.fromkeys((torch.masked_fill, Tensor.masked_fill), masked_fill),
    F.prelu: prelu,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), cat),
    torch.stack: stack,
}

# Calls that are run as the simpler calls they are made of.
COMPOSED: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head_attention,
    torch.lstm_cell: lstm_cell,
    torch.gru_cell: gru_cell,
    torch.rnn_tanh_cell: tanh_cell,
    torch.rnn_relu_cell: relu_cell,
}

MIXES_ROWS = frozenset({F.batch_norm, torch.batch_norm})
# Looked at even when no trainable parameter takes part: they mix rows, or write what they see.
GUARDED = frozenset(
    {
        *MIXES_ROWS,
        *(F.instance_norm, torch.instance_norm, F.embedding, F.embedding_bag, torch.fused_moving_avg_obs_fake_quant),
    }
)
