"""glibc's malloc as far as resident memory goes: what a process keeps of blocks that it freed.

Source: glibc 2.36, malloc/malloc.c (`_int_malloc`, `_int_memalign`, `_int_free`, `sysmalloc`,
`systrim`, `malloc_consolidate`, `munmap_chunk`), and mallopt(3) for the dynamic mmap threshold.
One thread's arena, grown with brk. In brief:

- A request takes the smallest free chunk that is large enough, and the rest of it stays free; else
  the top of the heap, which grows. A freed chunk is merged with free neighbours, and into the top.
- Small chunks that are freed wait in caches (tcache, fastbins), unmerged, and are handed out first.
- Only the top is given back, once it is larger than the trim threshold: what lies below a chunk in
  use stays resident.
- A request above the mmap threshold that no free chunk can serve is mapped by itself, and unmapped
  when freed; this raises the threshold to its size (up to 32 MiB) and the trim threshold to twice.
- An aligned request asks for a chunk that is larger by alignment and one smallest chunk, and gives
  back both ends: a hole of the size of an aligned block is too small for the next of that size.
"""

from bisect import bisect_left, insort

PAGE = 4096
ALIGNMENT = 64
"""Of torch's tensors on the CPU, c10::gAlignment."""

_SMALLEST = 32  # MINSIZE
_TOP_PAD = 128 << 10
_MMAP_THRESHOLD = 128 << 10
_MMAP_THRESHOLD_MAX = 32 << 20
_LARGE = 1024  # from this size on a request first merges the fastbins
_FASTBIN_MAX = 128
_TCACHE_MAX = 1040
_TCACHE_COUNT = 7
_CONSOLIDATION = 1 << 16  # a merged chunk of this size merges the fastbins and may trim


def _chunk_size(request: int) -> int:
    """Bytes of the chunk that serves a request: with its header, a multiple of 16."""
    return max(_SMALLEST, (request + 8 + 15) & ~15)


class Heap:
    """A heap that starts empty. Every block is taken to be written to its end at once.

    `malloc` and `aligned` return a handle for `free`.

    Args:
        start: bytes in use before the first block; it shifts all addresses.
    """

    def __init__(self, start: int = 0):
        self.peak = 0
        """Most bytes that were resident at one time."""
        self._end = self._top = self._touched = 0
        self._mapped = 0
        self._mmap_threshold = self._trim_threshold = _MMAP_THRESHOLD
        # free chunks by size, the oldest first, and by their first and last address
        self._bins: list[tuple[int, int, int]] = []
        self._starts: dict[int, tuple[int, int]] = {}
        self._ends: dict[int, int] = {}
        self._binned = 0
        self._tcache: dict[int, list[int]] = {}
        self._fastbins: dict[int, list[int]] = {}
        if start:
            self.malloc(start)

    @property
    def resident(self) -> int:
        """Bytes now: the heap as far as it was written, and mapped blocks."""
        return self._touched + self._mapped

    def malloc(self, size: int) -> tuple[int, int]:
        """A block of `size` bytes."""
        chunk = _chunk_size(size)
        cached = self._tcache.get(chunk)
        if cached:
            return cached.pop(), chunk
        return self._touch(*self._find(chunk))

    def aligned(self, size: int) -> tuple[int, int]:
        """A block of `size` bytes at a multiple of `ALIGNMENT`, as posix_memalign gives it."""
        chunk = _chunk_size(size)
        address, found = self._find(_chunk_size(chunk + ALIGNMENT + _SMALLEST))
        if address < 0:
            return self._touch(address, found)
        lead = -(address + 16) % ALIGNMENT
        if lead:
            lead += ALIGNMENT if lead < _SMALLEST else 0
            self._release(address, lead)
            address, found = address + lead, found - lead
        if found > chunk + _SMALLEST:
            self._release(address + chunk, found - chunk)
            found = chunk
        return self._touch(address, found)

    def free(self, block: tuple[int, int]) -> None:
        """Free a block that `malloc` or `aligned` returned."""
        address, size = block
        if address >= 0:
            self._release(address, size)
            return
        self._mapped -= size
        if self._mmap_threshold < size <= _MMAP_THRESHOLD_MAX:
            self._mmap_threshold, self._trim_threshold = size, 2 * size

    def _touch(self, address: int, size: int) -> tuple[int, int]:
        if address < 0:
            size = -(-(size + 8) // PAGE) * PAGE
            self._mapped += size
        else:
            self._touched = max(self._touched, address + size)
        self.peak = max(self.peak, self.resident)
        return address, size

    def _find(self, chunk: int) -> tuple[int, int]:
        """Address and size of a chunk in the heap, or -1 for one that is mapped by itself."""
        waiting = self._fastbins.get(chunk)
        if waiting:
            address = waiting.pop()
            cached = self._tcache.setdefault(chunk, [])
            while waiting and len(cached) < _TCACHE_COUNT:
                cached.append(waiting.pop())
            if not waiting:
                del self._fastbins[chunk]
            return address, chunk
        if chunk >= _LARGE:
            self._merge_fastbins()
        while True:
            best = bisect_left(self._bins, (chunk,))
            if best < len(self._bins):
                return self._split(best, chunk)
            if self._end - self._top >= chunk + _SMALLEST:
                break
            if self._fastbins:
                self._merge_fastbins()
                continue
            if chunk >= self._mmap_threshold:
                return -1, chunk
            missing = chunk + _SMALLEST + _TOP_PAD - (self._end - self._top)
            self._end += -(-missing // PAGE) * PAGE
            break
        self._top += chunk
        return self._top - chunk, chunk

    def _split(self, best: int, chunk: int) -> tuple[int, int]:
        """Take a chunk from the free one at this place of the bins."""
        size, _, address = self._bins[best]
        self._unbin(address)
        if size - chunk >= _SMALLEST:
            self._bin(address + chunk, size - chunk)
            return address, chunk
        if size == chunk < _LARGE:  # others of the size go to the cache
            cached = self._tcache.setdefault(chunk, [])
            while len(cached) < _TCACHE_COUNT and best < len(self._bins):
                if self._bins[best][0] != chunk:
                    break
                cached.append(self._bins[best][2])
                self._unbin(cached[-1])
        return address, size

    def _release(self, address: int, size: int) -> None:
        if size <= _TCACHE_MAX:
            cached = self._tcache.setdefault(size, [])
            if len(cached) < _TCACHE_COUNT:
                cached.append(address)
                return
        if size <= _FASTBIN_MAX:
            self._fastbins.setdefault(size, []).append(address)
            return
        if self._merge(address, size) >= _CONSOLIDATION:
            self._merge_fastbins()
            self._trim()

    def _merge(self, address: int, size: int) -> int:
        """Merge a chunk with its free neighbours, or into the top; returns the size of all."""
        if address in self._ends:
            address = self._ends[address]
            size += self._unbin(address)
        if address + size in self._starts:
            size += self._unbin(address + size)
        if address + size == self._top:
            self._top = address
            return self._end - address
        self._bin(address, size)
        return size

    def _merge_fastbins(self) -> None:
        waiting, self._fastbins = self._fastbins, {}
        for size in sorted(waiting):
            for address in reversed(waiting[size]):
                self._merge(address, size)

    def _trim(self) -> None:
        """Give the top back, but for some padding."""
        free = self._end - self._top
        if free >= self._trim_threshold:
            extra = (free - _SMALLEST - 1 - _TOP_PAD) // PAGE * PAGE
            self._end -= max(0, extra)
            self._touched = min(self._touched, self._end)

    def _bin(self, address: int, size: int) -> None:
        self._binned += 1
        self._starts[address] = (size, self._binned)
        self._ends[address + size] = address
        insort(self._bins, (size, self._binned, address))

    def _unbin(self, address: int) -> int:
        """Take a free chunk out of the bins; returns its size."""
        size, order = self._starts.pop(address)
        del self._ends[address + size]
        del self._bins[bisect_left(self._bins, (size, order, address))]
        return size
