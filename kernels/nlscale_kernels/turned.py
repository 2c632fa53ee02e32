"""Transposed sums that are operands of a product, found in what Triton makes of a kernel for Hopper GPUs.

A product leaves its sum in the registers of the tensor cores. Its transpose, handed straight to another product, goes
through shared memory in a layout that Triton 3.4 to 3.7.0 write wrongly in some shapes (flash-linear-attention, issue 640
and pull request 826). Who needs it transposed multiplies the other way round, or adds it to something first.
"""

import re

DEFINED = re.compile(r"\s*(%\w+)(?::\d+)? = \"?([\w.]+)\"? (.*)")
STRAIGHT = ("ttg.local_alloc", "ttg.local_load", "arith.truncf", "arith.extf", "arith.mulf", "arith.addf", "arith.negf")


def doubtful(triton: str, major: int) -> bool:
    """Whether this version compiles them wrongly in some shapes for GPUs of this compute capability."""
    return major == 9 and (3, 4) <= tuple(int(part) for part in re.findall(r"\d+", triton)[:3]) < (3, 7, 1)


def turned_sums(text: str) -> list[str]:
    """Products (names of their results) in the text of a module of TTGIR whose first operand is a transposed sum."""
    made = {match[1]: (match[2], match[3]) for match in map(DEFINED.match, text.splitlines()) if match}

    def turned(name: str) -> bool:
        operation, given = made.get(name, ("", ""))
        if operation == "tt.trans":
            return "#mma" in given.split("->")[0]
        return operation in STRAIGHT and any(map(turned, re.findall(r"%\w+", given.split(" : ")[0])))

    return [
        name
        for name, (operation, given) in made.items()
        if operation == "ttng.warp_group_dot" and turned(re.findall(r"%\w+", given)[0])
    ]
