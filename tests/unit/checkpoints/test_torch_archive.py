"""An archive put together around a tensor's bytes is the one that torch.save would have written."""

import io
import zipfile

import pytest
import torch

from megatron_vespo.checkpoints.torch_archive import around


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 48, 64), (5,), (1, 3, 1), (1,), (0, 4)])
def test_torch_reads_it(shape, dtype):
    for seed in range(2):  # the second one uses the first one's ends again
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        before, after = around(values)
        archive = io.BytesIO(before + values.view(-1).view(torch.uint8).numpy().tobytes() + after)
        assert zipfile.ZipFile(archive).testzip() is None  # every CRC holds
        archive.seek(0)
        loaded = torch.load(archive, weights_only=True)
        assert loaded.dtype == dtype and loaded.shape == values.shape and loaded.equal(values)


def test_only_the_check_sum_and_the_identifier_differ():
    values = torch.randn(1, 7, 3)
    stream = io.BytesIO()
    torch.save(values, stream)
    before, after = around(values)
    ours = zipfile.ZipFile(io.BytesIO(before + values.view(-1).view(torch.uint8).numpy().tobytes() + after))
    theirs = zipfile.ZipFile(stream)
    for one, other in zip(ours.infolist(), theirs.infolist(), strict=True):
        assert (one.filename, one.header_offset, one.file_size) == (
            other.filename,
            other.header_offset,
            other.file_size,
        )
        if not one.filename.endswith(".data/serialization_id"):
            assert ours.read(one) == theirs.read(other) and one.CRC == other.CRC
