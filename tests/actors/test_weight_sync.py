from __future__ import annotations

import numpy as np
import torch

from rlflow.actors.weight_sync import pack_weights, unpack_weights


def test_what_is_unpacked_equals_what_was_packed_in_every_dtype_and_shape():
    named = [
        ("a", torch.randn(3, 5)),
        ("b", torch.randn(7).to(torch.bfloat16)),
        ("c", torch.randn(2, 4).T.to(torch.float16)),
        ("scalar", torch.tensor(2.5)),
    ]
    snapshot = pack_weights(named, version=3)
    assert snapshot.version == 3
    for (name, tensor), (name_back, tensor_back) in zip(named, unpack_weights(snapshot), strict=True):
        assert name == name_back
        assert tensor.dtype == tensor_back.dtype
        assert torch.equal(tensor, tensor_back)


def test_a_read_only_buffer_is_accepted_without_a_warning(recwarn):
    snapshot = pack_weights([("a", torch.ones(4))], version=0)
    snapshot.buffer.flags.writeable = False
    [(_, tensor)] = list(unpack_weights(snapshot))
    assert np.array_equal(tensor.numpy(), np.ones(4, dtype=np.float32))
    assert not recwarn.list
