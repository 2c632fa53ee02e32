"""What a kernel's machine code is made of, read with the tools that come with Triton.

The disassembler takes half a second to begin, however little it reads: the code of many kernels is given to it at once.
"""

import contextlib
import io
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

BYTES = 16  # of an instruction, on every architecture since sm_70
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)")
TARGET = re.compile(r"\.target\s+(sm_\w+)")


class Code(NamedTuple):
    """One kernel, compiled."""

    kernel: Any  # Triton's
    spills: int  # bytes that the assembler says it stores and loads for want of registers


def compiled(source: Any, target: Any, options: dict[str, Any]) -> Code:
    """Triton's kernel, compiled anew, and what its assembler said of spills."""
    import triton
    from triton import knobs

    said = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        knobs.compilation.always_compile = True  # a kernel from the cache has no assembler's words
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=target, options=options)
    spilled = SPILLS.search(said.getvalue())
    assert spilled, f"ptxas said nothing of spills: {said.getvalue()[:300]}"
    return Code(kernel, int(spilled[1]) + int(spilled[2]))


def registers(kernel: Any) -> int:
    """Of a thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        found = RESOURCES.search(tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary.name))
    assert found, "cuobjdump named no resources"
    return int(found[1])


def instructions(kernels: Sequence[Any]) -> list[Counter[str]]:
    """How often each instruction stands in the code of each kernel, all of one architecture; those that move 16 bytes of a
    thread at once also as, for instance, LDG.128.
    """
    from triton import knobs

    target = TARGET.search(kernels[0].asm["ptx"])
    assert target, "the source names no target"
    codes = [text_of(kernel.asm["cubin"]) for kernel in kernels]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "code")
        raw.write_bytes(b"".join(codes))
        said = tool(knobs.nvidia.nvdisasm.path, "--binary", target[1].replace("sm_", "SM"), str(raw))
    lines = filter(None, map(INSTRUCTION.match, said.splitlines()))
    found = [counted(islice(lines, len(code) // BYTES)) for code in codes]
    counts = [sum(count for name, count in each.items() if "." not in name) for each in found]
    assert counts == [len(code) // BYTES for code in codes], f"nvdisasm said something else: {said[:300]}"
    return found


def counted(lines: Iterator[re.Match[str]]) -> Counter[str]:
    """Instructions by name."""
    found: Counter[str] = Counter()
    for line in lines:
        found[line[1]] += 1
        if ".128" in line[2]:
            found[f"{line[1]}.128"] += 1
    return found


def text_of(cubin: bytes) -> bytes:
    """The sections of instructions of a binary, which is a file in the 64-bit form of ELF."""
    offset, size, count, names = struct.unpack_from("<40xQ10xHHH", cubin)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    first = headers[names][4]

    def name(at: int) -> bytes:
        return cubin[first + at : cubin.index(b"\0", first + at)]

    return b"".join(
        cubin[at : at + length] for called, _, _, _, at, length in headers if name(called).startswith(b".text")
    )


def tool(*command: str) -> str:
    """What a tool that comes with Triton says."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
