"""Open a GGUF file with gguf-py, which believes what a header says: lengths are checked here.

gguf-py also makes two arrays of every token of a vocabulary, which takes seconds. Here a list of
numbers is one array, and a list of strings one of views of their bytes.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal

from ...errors import CheckpointError
from ...files.inside import check_regular
from . import FORMAT

_MOST = 1 << 21  # of key-values, tensors, and entries of one array: vocabularies have up to 2^18


@cache
def _reader_class() -> type:
    gguf = FORMAT.library("gguf")

    class Reader(gguf.GGUFReader):  # type: ignore[misc,name-defined]
        """The library's reader, for long lists, and files that end early or count wrongly."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> Any:
            found = super()._get(int(offset), dtype, count, *rest, **more)
            if len(found) != int(count):
                raise ValueError(f"it ends in what is at byte {offset}")
            return found

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            kinds = gguf.GGUFValueType
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            head = [self._get(orig_offs, "<u4"), self._get(orig_offs + 4, "<u8")]
            inner, length = kinds(int(head[0][0])), int(head[1][0])
            if length > _MOST or inner == kinds.ARRAY:
                raise ValueError(f"an array of {length} entries of type {inner}")
            start = orig_offs + 12
            if inner == kinds.STRING:
                size, parts = _strings(memoryview(self.data), start, length, self.byte_order == "S")
            else:
                parts = [self._get(start, self.gguf_scalar_to_np[inner], length)]
                size = int(parts[0].nbytes)
            places = range(len(head), len(head) + len(parts))
            return 12 + size, [*head, *parts], list(places), [kinds.ARRAY, inner]

        def _build_fields(self, offs: int, count: int) -> int:
            return int(super()._build_fields(offs, _counted(count, "key-values")))

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            return super()._build_tensor_info(offs, _counted(count, "tensors"))

    return Reader


def _strings(
    data: memoryview, start: int, count: int, swapped: bool
) -> tuple[int, list[memoryview]]:
    """Return how many bytes a list of strings takes, and each of them."""
    order: Literal["little", "big"] = "big" if swapped else "little"
    found, at = [], start
    for _ in range(count):
        end = at + 8 + int.from_bytes(data[at : at + 8], order)
        if end > len(data):
            raise ValueError(f"it ends in a list of {count} strings")
        found.append(data[at + 8 : end])
        at = end
    return at - start, found


def _counted(count: int, what: str) -> int:
    if count > _MOST:
        raise ValueError(f"{count} {what}")
    return int(count)


def open_gguf(path: Path) -> Any:
    """Return gguf-py's reader of a file.

    Raises:
        CheckpointError: it is not GGUF, or damaged.
    """
    check_regular(path)
    try:
        return _reader_class()(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as GGUF ({error}). Download or copy it again."
        ) from error
