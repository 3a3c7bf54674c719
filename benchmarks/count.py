"""Counts the cycles, bytes and kernels of a compiled program, from its text.

The cost of a program is that of the instructions of its ENTRY computation, plus that of the body of
every loop that it calls, times the number of rounds. A loop whose number of rounds is not known at
compile time counts as no round; the cost with one round is reported separately.

- Cycles are the sum of XLA's `estimated_cycles`, which its TPU compiler gives to the instructions
  of the vector and matrix units. Asynchronous copies, operations on single numbers, and the
  backward pass of max pooling, which is the same in all programs of a model, have no estimate and
  count as 0. Reshapes and slices without an estimate count as copies: the compiler's estimate for a
  copy is at least 1824 cycles, plus one for each 311 bytes that it reads or writes. Any other
  instruction without an estimate, such as a custom call, makes the sum None.
- Bytes are those of the operands and results of the instructions. An operand that is read through a
  slice counts as the slice, and an operand that is updated in place counts as the update.
- Kernels are the instructions that take time.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128, "bf16": 16}
# Instructions that take no time: they name, group or reinterpret values.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
# The second half of an asynchronous instruction; the first half has the operands and the result.
ENDS = re.compile(r".*-(done|update)$")
# Calls that allocate memory or annotate the program, and compute nothing.
EMPTY_CALLS = {
    "AllocateBuffer",
    "ConcatBitcast",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
}
SLICES = {"slice", "dynamic-slice"}
UNKNOWN_TO_ALL = {"select-and-scatter"}  # the transpose of max pooling
NUMBER = 8  # bytes of a single number, at most
COPIES = {"reshape", "slice", "dynamic-slice", "dynamic-update-slice"}
COPY, BYTES_A_CYCLE = 1824, 311  # TPU v5e: the minimum of a copy, and the rate of f32[65536,1024]


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a program; `cycles` is None if an instruction has no estimate."""

    cycles: float | None = 0
    bytes: int = 0
    kernels: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Returns the cost of two programs that run in sequence."""
        known = self.cycles is not None and other.cycles is not None
        return Cost(
            self.cycles + other.cycles if known else None,  # type: ignore[operator]
            self.bytes + other.bytes,
            self.kernels + other.kernels,
        )

    def __mul__(self, times: int) -> "Cost":
        """Returns the cost of running the program `times` times."""
        cycles = None if self.cycles is None else self.cycles * times
        return Cost(cycles, self.bytes * times, self.kernels * times)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def called(self, attribute: str) -> str | None:
        """Returns the name of the computation that an attribute, such as `body`, refers to."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found and found[1]


Computation = dict[str, Instruction]
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a program, and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            current = head[2]
            computations[current] = {}
            entry = current if head[1] else entry
        elif current and (found := LINE.match(line)):
            instruction = _instruction(found, line[found.end() :])
            computations[current][instruction.name] = instruction
    return computations, entry


def _instruction(head: re.Match[str], text: str) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    op, text = text.split("(", 1)
    end = _closing("(" + text) - 2
    operands = tuple(re.findall(r"%([\w.\-]+)", text[:end])) if op != "constant" else ()
    rest = text if op in ("constant", "parameter") else text[end + 1 :]
    return Instruction(head[2], kind, op, operands, rest, bool(head[1]))


def _closing(text: str) -> int:
    """Returns the position after the parenthesis that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def nbytes(kind: str) -> int:
    """Returns the bytes of a type, or of all members of a tuple."""
    return sum(
        math.prod(int(n) for n in shape.split(",") if n) * _bits(dtype) // 8
        for dtype, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", kind)
    )


def _bits(dtype: str) -> int:
    found = re.match(r"[a-z]+(\d+)", dtype)
    return BITS[dtype] if dtype in BITS else int(found[1]) if found else 0


class Program:
    """The counts of a compiled program."""

    def __init__(self, text: str) -> None:
        self.computations, self.entry = parse(text)

    def cost(self, rounds: int = 0) -> Cost:
        """Returns the cost, with `rounds` rounds of each loop whose number is not known."""
        return self._cost(self.entry, rounds)

    def loops(self) -> tuple[int, int]:
        """Returns the number of loops with a known number of rounds, and that of all others."""
        found = list(self._loops(self.entry))
        known = sum(rounds is not None for rounds in found)
        return known, len(found) - known

    def _loops(self, name: str) -> Iterator[int | None]:
        for i in self.computations[name].values():
            if i.op == "while":
                yield self.rounds(i)
                yield from self._loops(_named(i, "body"))
            elif i.op == "call":
                yield from self._loops(_named(i, "to_apply"))

    def _cost(self, name: str, unknown: int) -> Cost:
        total = Cost()
        for i in self.computations[name].values():
            if i.op == "while":
                rounds = self.rounds(i)
                body = self._cost(_named(i, "body"), unknown)
                total += body * (unknown if rounds is None else rounds)
            elif i.op == "call":
                total += self._cost(_named(i, "to_apply"), unknown)
            elif i.op == "conditional":
                raise ValueError("a conditional, whose branch is not known")
            elif not self._is_free(i):
                moved = self._bytes(i, self.computations[name])
                total += Cost(self._cycles(i, moved), moved, 1)
        return total

    def _is_free(self, i: Instruction) -> bool:
        if i.op == "fusion":  # it only contains bitcasts
            return all(j.op in FREE for j in self.computations[_named(i, "calls")].values())
        return (
            i.op in FREE
            or ENDS.match(i.op) is not None
            or (i.op == "custom-call" and _call_target(i) in EMPTY_CALLS)
        )

    def rounds(self, loop: Instruction) -> int | None:
        """Returns the number of rounds of a loop, or None if the program does not contain it."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if found:
            return int(found[1])
        # On a TPU, only the condition contains it: `i < constant` for a scan, which begins at 0.
        condition = self.computations[_named(loop, "condition")]
        (root,) = (i for i in condition.values() if i.root)
        if root.op == "fusion":  # the same, as a fusion
            condition = self.computations[_named(root, "calls")] | condition
            (root,) = (i for i in self.computations[_named(root, "calls")].values() if i.root)
        if root.op != "compare" or "direction=LT" not in root.rest:
            return None
        limit = condition[root.operands[1]]
        if limit.op == "parameter":  # it is a parameter of the fusion
            constants = [i for i in condition.values() if i.op == "constant"]
            limit = constants[0] if len(constants) == 1 else limit
        found = re.match(r"(\d+)\)", limit.rest)
        return int(found[1]) if limit.op == "constant" and found else None

    def _cycles(self, i: Instruction, moved: int) -> float | None:
        if found := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
            return int(found[1])
        if i.op in COPIES:
            return COPY + moved // BYTES_A_CYCLE
        alike = i.op.endswith("-start") or i.op in UNKNOWN_TO_ALL or nbytes(i.type) <= NUMBER
        return 0 if alike else None

    def _bytes(self, i: Instruction, computation: Computation) -> int:
        operands = [computation[name] for name in i.operands if name in computation]
        if i.op in SLICES:
            return 2 * nbytes(i.type)
        if i.op == "dynamic-update-slice":
            return 2 * nbytes(operands[1].type)
        if i.op == "fusion":
            return self._fusion_bytes(self.computations[_named(i, "calls")], operands)
        if i.op.endswith("-start"):  # its type repeats the operands
            return 2 * sum(nbytes(operand.type) for operand in operands)
        return nbytes(i.type) + sum(nbytes(operand.type) for operand in operands)

    def _fusion_bytes(self, fused: Computation, operands: list[Instruction]) -> int:
        users: dict[str, list[Instruction]] = {}
        for i in fused.values():
            for operand in i.operands:
                users.setdefault(operand, []).append(i)
        total = 0
        for i in fused.values():
            if i.op == "parameter":
                number = re.match(r"(\d+)\)", i.rest)
                assert number is not None
                whole = nbytes(operands[int(number[1])].type)
                total += min(whole, self._read(i.name, users, whole))
            if i.root:
                total += self._written(i, fused)
        return total

    def _read(self, name: str, users: dict[str, list[Instruction]], whole: int) -> int:
        """Returns the bytes that a fusion reads of a parameter; it may read only slices of it."""
        total = 0
        for user in users.get(name, []):
            if user.op in SLICES and user.operands[0] == name:
                total += nbytes(user.type)
            elif user.op == "dynamic-update-slice" and user.operands[0] == name:
                continue  # this is updated in place
            elif user.op == "bitcast":
                total += self._read(user.name, users, whole)
            else:
                return whole
        return total

    def _written(self, root: Instruction, fused: Computation) -> int:
        """Returns the bytes that a fusion writes; for an update in place, those of the update."""
        if root.op == "tuple":
            return sum(self._written(fused[name], fused) for name in root.operands)
        if root.op == "bitcast" and root.operands[0] in fused:
            return self._written(fused[root.operands[0]], fused)
        if root.op == "dynamic-update-slice":
            return nbytes(fused[root.operands[1]].type)
        return nbytes(root.type)


def _named(i: Instruction, attribute: str) -> str:
    found = i.called(attribute)
    assert found is not None, f"{i.op} {i.name} names no {attribute}"
    return found


def _call_target(i: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', i.rest)
    return found[1] if found else ""
