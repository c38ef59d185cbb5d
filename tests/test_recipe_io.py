"""Recipes as text, on small parts of our own and of somebody else's module, besides the real ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import pytest

from flowgrpo_fast import recipe_io
from flowgrpo_fast.field_types import accepts, described, fits, lacks
from flowgrpo_fast.json_files import check_name, named_code, read_json
from flowgrpo_fast.recipes.trajectory import mix_grpo
from flowgrpo_fast.run_files import RunFiles


class Objective(Protocol):
    couples: bool

    @property
    def requires(self) -> str: ...

    def measure(self, point: float) -> float: ...

    def loss(self, stats: float) -> float: ...


class CreditStep(Protocol):
    def apply(self, credit: float) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    clip_range: float = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    trust: Clip = field(default_factory=Clip)
    couples: bool = False
    requires: ClassVar[str] = "log-probs"

    def measure(self, point: float) -> float:
        return point

    def loss(self, stats: float) -> float:
        return stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward(Objective):  # names its protocol, and need not
    beta: float = 1.0
    couples: ClassVar[bool] = False

    @property
    def requires(self) -> str:
        raise RuntimeError("a check of the class runs no property")

    def measure(self, point: float) -> float:
        return point

    def loss(self, stats: float) -> float:
        return stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalise:
    eps: float = 1e-4
    std: Literal["group", "batch"] = "group"

    def apply(self, credit: float) -> float:
        return credit / self.eps


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    by: float

    def apply(self, credit: float) -> float:
        return min(credit, self.by)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sigmas:
    num_steps: int = 10
    shift: float | Clip = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    function: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    name: str = "job"
    group_size: int = 24
    sigmas: Sigmas = field(default_factory=Sigmas)
    objective: Objective = field(default_factory=PolicyGradient)
    extra: Objective | None = None
    credit: tuple[CreditStep, ...] = (Normalise(),)
    rewards: tuple[Term, ...] = (Term(function="a.b:c"), Term(function="a.b:d", weight=0.2))
    snapshots: dict[str, Sigmas] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    precision: Literal["fp32", "bf16", "tf32"] = "fp32"
    most: Literal[1, 2, "all"] = "all"


KNOWN = (Job, Sigmas, PolicyGradient, Forward, Normalise, Bound, Clip, Term, Optimizer)
FILES = RunFiles(
    root=Job,
    parts={part.__name__: part for part in KNOWN},
    replaced={
        ("Job", "loss"): "objective: ClippedRatio(clip_range) is PolicyGradient(trust=Clip(clip_range))",
        ("Optimizer", "num_updates"): "Job.num_updates",
        "ClippedRatio": "PolicyGradient: its trust is a Clip",
    },
)

THEIRS = """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass(frozen=True)
class Inner:
    width: int = 3

@dataclass(frozen=True)
class Mine:
    scale: float = 1.0
    inner: Inner = field(default_factory=Inner)
    couples = True
    requires = "nothing"

    def measure(self, point):
        return self.scale * point

    def loss(self, stats):
        return -stats

class Outer:
    @dataclass(frozen=True)
    class Step:
        by: int = 1
        def apply(self, credit):
            return credit + self.by

@dataclass
class Changeable:
    scale: float = 1.0

@dataclass(frozen=True)
class Unreadable:
    scale: Missing = 1

class Plain:
    pass

def function():
    return 1
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_pkg").mkdir()
    (tmp_path / "their_pkg" / "__init__.py").write_text("")
    (tmp_path / "their_pkg" / "parts.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("their_pkg", "their_pkg.parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "their_pkg.parts"


def line(run: Any, *arguments: Any) -> str:
    """The message of the error that a call ends with: one line."""
    with pytest.raises(ValueError, match=r".") as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(**fields: Any) -> dict[str, Any]:
    return {"is": "Job", **fields}


# ---------------------------------------------------------------------------------------- their own parts


def test_somebody_elses_part_is_set_written_and_read_again(theirs: str, tmp_path: Path) -> None:
    job = FILES.override(
        Job(),
        [
            f"objective={theirs}:Mine",
            "objective.scale=2",
            "objective.inner.width=5",
            f"credit.0={theirs}:Outer.Step",
        ],
    )
    assert (job.objective.scale, job.objective.inner.width, job.credit[0].by) == (2.0, 5, 1)
    FILES.save(job, tmp_path / "recipe.json")
    values = json.loads((tmp_path / "recipe.json").read_text())
    assert values["objective"] == {
        "is": f"{theirs}:Mine",
        "scale": 2.0,
        "inner": {"is": f"{theirs}:Inner", "width": 5},
    }
    assert values["credit"] == [{"is": f"{theirs}:Outer.Step", "by": 1}]
    assert values["sigmas"]["is"] == "Sigmas"
    assert FILES.load(tmp_path) == job


def test_a_known_class_has_its_short_name_however_it_was_named() -> None:
    job = FILES.override(Job(), [f"objective={__name__}:Forward"])
    assert job.objective == Forward()
    assert FILES.to_dict(job)["objective"] == {"is": "Forward", "beta": 1.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Changeable", "is a dataclass that can be changed; a part must be a frozen dataclass"),
        ("Plain", "is a class without fields; a part must be a frozen dataclass"),
        ("function", "is a function; a part must be a frozen dataclass"),
        ("Outer.Missing", "is a NoneType; a part must be"),
        ("Min", "module their_pkg.parts has no 'Min'"),
        (
            "Unreadable",
            "Unreadable cannot be read: name 'Missing' is not defined; import what its fields' types",
        ),
    ],
)
def test_what_cannot_be_a_part_says_what_it_is(theirs: str, name: str, message: str) -> None:
    assert message in line(FILES.from_dict, written(objective={"is": f"{theirs}:{name}"}))
    assert message in line(FILES.override, Job(), [f"rewards.0={theirs}:{name}"]) or name == "Unreadable"


def test_their_parts_are_checked_as_ours(theirs: str) -> None:
    mine = {"is": f"{theirs}:Mine"}
    assert line(FILES.from_dict, written(objective={**mine, "scale": "2"})) == (
        'Job.objective.scale is "2"; it must be a value of type float, such as 1.0'
    )
    assert "Mine has no field 'scle'; did you mean 'scale'?" in line(
        FILES.from_dict, written(objective={**mine, "scle": 2})
    )
    assert "Inner has no field 'widht'; did you mean 'width'?" in line(
        FILES.override, FILES.override(Job(), [f"objective={theirs}:Mine"]), ["objective.inner.widht=2"]
    )
    assert line(FILES.override, Job(), ["objective=no_such_pkg.parts:Mine"]) == (
        "objective: 'no_such_pkg.parts:Mine': there is no module 'no_such_pkg'"
    )
    assert "Job.objective: unknown recipe part 'PolicyGradien'; did you mean 'PolicyGradient'?" in line(
        FILES.from_dict, written(objective={"is": "PolicyGradien"})
    )


# -------------------------------------------------------------------------------------------- field types


def test_a_protocol_is_its_members() -> None:
    assert lacks(PolicyGradient, Objective) == lacks(Forward, Objective) == lacks(Bound, CreditStep) == []
    assert lacks(Sigmas, Objective) == [
        "no attribute 'couples'",
        "no attribute 'requires'",
        "no method 'measure'",
        "no method 'loss'",
    ]
    assert accepts(Objective | None, Forward)
    assert not accepts(Objective, Bound)
    assert not fits(Forward, Objective)  # a class is not a part


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [3, 10**30], [3.0, True, "3", None]),
        (float, [3.0, 3], [True, "3", 10**400]),
        (bool, [True], [1, 0]),
        (int | None, [None, 2], ["2", 2.0]),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0]),
        (tuple[int, ...], [(), (1, 2)], [(1, "2"), [1], 1]),
        (tuple[int, str], [(1, "a")], [(1,), (1, "a", 2), ("a", 1)]),
        (tuple, [(), (1, "a")], [[1]]),
        (list[int], [[1]], [(1,), ["1"]]),
        (dict[str, float], [{}, {"a": 1.0}], [{"a": "1"}, {1: 1.0}, [], None]),
        (Mapping[str, Bound], [{"a": Bound(by=1.0)}], [{"a": Clip()}]),
        (Clip | tuple[Clip, ...], [Clip(), (Clip(),)], [Sigmas(), (Sigmas(),)]),
        (Objective, [PolicyGradient(), Forward()], [Sigmas(), 1, None, PolicyGradient]),
        (Any, [1, None, Clip()], []),
    ],
)
def test_values_that_have_a_type(hint: Any, good: list, bad: list) -> None:
    assert [value for value in good if not fits(value, hint)] == []
    assert [value for value in bad if fits(value, hint)] == []


def test_types_in_words() -> None:
    assert described(tuple[Term, ...]) == "[Term, ...]"
    assert described(Literal["a", "b", 3]) == "'a', 'b' or 3"
    assert described(dict[str, float | None]) == "{str: float or null}"
    assert described(Objective | None) == "Objective or null"


# -------------------------------------------------------------------------------------------- run files


def test_every_kind_of_field_survives_the_round_trip(tmp_path: Path) -> None:
    job = Job(
        name="all",
        objective=Forward(beta=0.5),
        extra=PolicyGradient(trust=Clip(clip_range=0.1)),
        credit=(Normalise(std="batch"), Bound(by=5.0)),
        snapshots={"old": Sigmas(num_steps=4), "start": Sigmas(shift=Clip())},
        weights={"is it": 1.0},
        most=2,
    )
    FILES.save(job, tmp_path / "a.json")
    assert FILES.load(tmp_path / "a.json") == job
    assert FILES.from_dict(FILES.to_dict(job)) == job
    assert FILES.from_dict(written()) == Job()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"objective": {"is": "Sigmas"}},
            "Job.objective is a Sigmas, which has no attribute 'couples', no attribute 'requires', no method 'measure' "
            "and no method 'loss'; an objective is one of PolicyGradient, Forward or your own class, my_module:MyPart",
        ),
        (
            {"credit": [{"is": "Normalise"}, {"is": "Optimizer"}]},
            "Job.credit.1 is an Optimizer, which has no method 'apply'; a credit step is one of Normalise, Bound or "
            "your own class, my_module:MyPart",
        ),
        (
            {"objective": 3},
            "Job.objective is 3; an objective is one of PolicyGradient, Forward or your own class, my_module:MyPart",
        ),
        ({"precision": "fp8"}, "Job.precision is \"fp8\"; it must be 'fp32', 'bf16' or 'tf32'"),
        ({"most": 3}, "Job.most is 3; it must be 1, 2 or 'all'"),
        ({"most": True}, "Job.most is true; it must be 1, 2 or 'all'"),
        (
            {"credit": [{"is": "Normalise", "std": "global"}]},
            "Job.credit.0.std is \"global\"; it must be 'group' or 'batch'",
        ),
        ({"credit": [{"is": "Bound"}]}, "Job.credit.0: Bound needs a value for 'by'"),
        (
            {"weights": {"a": "much"}},
            'Job.weights is {"a": "much"}; it must be a value of type {str: float}, such as {}',
        ),
        (
            {"snapshots": {"old": {"num_steps": 3}}},
            'Job.snapshots.old: {"num_steps": 3} has no "is" that names its part, such as "Sigmas"',
        ),
        ({"sigmas": {"is": 3}}, 'Job.sigmas: {"is": 3} has no "is" that names its part, such as "Sigmas"'),
        ({"lr": 1}, "Job has no field 'lr'; did you mean 'optimizer.lr'?"),
        (
            {"optimizer": {"is": "Optimizer", "group_size": 1}},
            "Optimizer has no field 'group_size'; did you mean 'group_size' at the top?",
        ),
        (
            {"optimizer": {"is": "Optimizer", "clip_rnge": 1}},
            "Optimizer has no field 'clip_rnge'; did you mean 'objective.trust.clip_range'?",
        ),
        (
            {"optimizer": {"is": "Optimizer", "lr": float("nan")}},
            "Job.optimizer.lr is NaN; it must be a finite number",
        ),
        (
            {"optimizer": {"is": "Optimizer", "betas": [0.9, float("inf")]}},
            "Job.optimizer.betas.1 is Infinity; it must",
        ),
        ({"group_size": float("-inf")}, "Job.group_size is -Infinity; it must be a finite number"),
    ],
)
def test_a_bad_run_file_is_one_line(fields: dict, message: str) -> None:
    assert message in line(FILES.from_dict, written(**fields))


def test_names_of_the_first_edition_say_what_replaced_them() -> None:
    loss = {"is": "ClippedRatio", "clip_range": 1e-5}
    replaced = (
        "Job.loss was replaced by objective in the second edition: ClippedRatio(clip_range) is "
        "PolicyGradient(trust=Clip(clip_range))"
    )
    assert line(FILES.from_dict, written(loss=loss)) == replaced
    assert line(FILES.override, Job(), ["loss.clip_range=1e-5"]) == replaced
    assert line(FILES.override, Job(), ["optimizer.num_updates=2"]) == (
        "Optimizer.num_updates was replaced by Job.num_updates in the second edition"
    )
    part = "ClippedRatio was replaced by PolicyGradient in the second edition: its trust is a Clip"
    assert line(FILES.from_dict, written(objective=loss)) == f"Job.objective: {part}"
    assert line(FILES.override, Job(), ["objective=ClippedRatio"]) == f"objective: {part}"
    known = replace(FILES, replaced={"Clip": "nothing", ("Job", "name"): "nothing"})
    assert (
        known.override(Job(), ["sigmas.shift=Clip", "name=a"]).sigmas.shift == Clip()
    )  # what is known is not asked


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"is": "Job", "group_size": 2, "group_size": 3}',
            '"group_size" is given twice in one object; keep one',
        ),
        ('{"is": "Job", "optimizer": {"is": "Optimizer", "lr": 1, "lr": 1}}', '"lr" is given twice'),
        ('{"is": "Job", "is": "Sigmas"}', '"is" is given twice'),
        (
            '{"is": "Job", "optimizer": {"is": "Optimizer", "lr": 1e999}}',
            "Job.optimizer.lr is Infinity; it must be",
        ),
        ('{"is": "Job", "optimizer": {"is": "Optimizer", "lr": -Infinity}}', "Job.optimizer.lr is -Infinity"),
        ('{"is": "Job", "weights": {"a": NaN}}', "Job.weights.a is NaN; it must be a finite number"),
        (
            '{"is": "Job", "optimizer": {"is": "Optimizer", "lr": 1' + "0" * 400 + "}}",
            "must be a value of type float",
        ),
        ("[" * 100_000, "is not a JSON recipe"),
        ("9" * 5000, "is not a JSON recipe"),
        ('{"is": "Job", "group_size": "' + "9" * 5000 + '"}', "999...; it must be a value of type int"),
        ("[]", "holds a tuple, not a Job"),
        ('{"is": "Sigmas"}', "holds a Sigmas, not a Job"),
        ('{"group_size": 2}', '{"group_size": 2} has no "is" that names its part, such as "Job"'),
    ],
)
def test_what_a_run_file_may_not_hold(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(text)
    found = line(FILES.load, tmp_path)
    assert message in found
    assert len(found) < 600


def test_a_large_count_is_just_a_number() -> None:
    assert FILES.from_dict(written(group_size=10**30)).group_size == 10**30


def test_files_are_utf8_whatever_the_editor(tmp_path: Path) -> None:
    text = json.dumps(
        written(rewards=[{"is": "Term", "function": "a.b:gr\u00f6\u00dfe"}]), ensure_ascii=False
    )
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    job = FILES.load(tmp_path / "a.json")
    assert job.rewards[0].function == "a.b:gr\u00f6\u00dfe"
    FILES.save(job, tmp_path / "b.json")
    assert (tmp_path / "b.json").read_bytes().isascii()
    assert FILES.load(tmp_path / "b.json") == job
    (tmp_path / "c.json").write_bytes(text.encode("latin-1"))
    assert "c.json' is not UTF-8 text: its byte" in line(FILES.load, tmp_path / "c.json")


def test_a_file_is_replaced_whole_and_only_if_it_changes(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "recipe.json"
    FILES.save(Job(), file)
    before = file.stat()
    FILES.save(Job(), file)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    FILES.save(Job(group_size=2), file)
    assert FILES.load(file).group_size == 2

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as half:
            half.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        FILES.save(Job(group_size=3), file)
    assert FILES.load(file).group_size == 2
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Local(PolicyGradient):
        pass

    for job, message in (
        (
            Job(objective=Local()),
            "Job.objective is a Local, a class inside a function, which no run file can name",
        ),
        (Job(optimizer=Optimizer(lr=float("nan"))), "Job.optimizer.lr is NaN; it must be a finite number"),
        (Job(weights={"is": 1.0}), "Job.weights has the keys ['is']; they must be strings other than 'is'"),
        (Job(name=Path("a")), "Path, which a run file cannot hold"),  # type: ignore[arg-type]
    ):
        assert message in line(FILES.save, job, tmp_path / "recipe.json")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- overrides


def test_overrides_reach_items_of_lists_and_mappings() -> None:
    job = FILES.override(
        Job(),
        [
            'credit=[{"is": "Normalise"}, {"is": "Bound", "by": 5.0}]',
            "credit.0.eps=0.3",
            "credit.1.by=2",
            "rewards.1.weight=0.5",
            "optimizer.betas.0=0.8",
            "snapshots.old=Sigmas",
            "snapshots.old.num_steps=4",
            'weights={"a": 1.5}',
            "weights.b=2",
            "extra=Forward",
            "extra.beta=2",
            "sigmas.shift=Clip",
            "most=2",
            "name=2026",
        ],
    )
    assert job.credit == (Normalise(eps=0.3), Bound(by=2.0))
    assert type(job.credit[1].by) is float
    assert job.rewards == (Term(function="a.b:c"), Term(function="a.b:d", weight=0.5))
    assert job.optimizer.betas == (0.8, 0.999)
    assert job.snapshots == {"old": Sigmas(num_steps=4)}
    assert job.weights == {"a": 1.5, "b": 2.0}
    assert job.extra == Forward(beta=2.0)
    assert job.sigmas.shift == Clip()
    assert (job.most, job.name) == (2, "2026")
    assert FILES.override(job, ["extra=null", "credit.1=Normalise"]).credit == (
        Normalise(eps=0.3),
        Normalise(),
    )


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("credit.1.eps=1", "credit.1 is not there, credit has 1 items; give an index from 0 to 0"),
        ("rewards.-1.weight=1", "rewards.-1 is not there, rewards has 2 items; give an index from 0 to 1"),
        (
            "rewards.first.weight=1",
            "rewards.first is not there, rewards has 2 items; give an index from 0 to 1",
        ),
        ("rewards.0.weigth=1", "Term has no field 'weigth'; did you mean 'weight'?"),
        ("rewards.0.weight=a", "rewards.0.weight is 'a'; it must be a value of type float, such as 1.0"),
        ("snapshots.old.num_steps=1", "snapshots has no 'old'"),
        ("extra.beta=1", "extra.beta: extra is null; choose a part first, such as extra=PolicyGradient"),
        ("lr=1", "Job has no field 'lr'; did you mean 'optimizer.lr'?"),
        ("optimizr.lr=1", "Job has no field 'optimizr'; did you mean 'optimizer.lr'?"),
        ("sigmas.lr=1", "Sigmas has no field 'lr'; did you mean 'optimizer.lr'?"),
        (
            "objective.clip_range=1",
            "PolicyGradient has no field 'clip_range'; did you mean 'objective.trust.clip_range'?",
        ),
        ("objective.trust.qqq=1", "Clip has no field 'qqq'; known: clip_range"),
        ("weigth=1", "Job has no field 'weigth'; did you mean 'rewards.0.weight'?"),
        ("--group_size=12", "--group_size is not an option; write group_size=12"),
        ("--lr=3", "--lr is not an option; write optimizer.lr=3"),
        ("--zebra=3", "--zebra is not an option; write field=value, without dashes"),
        (
            "objective=Sigmas",
            "objective is a Sigmas, which has no attribute 'couples', no attribute 'requires', no meth",
        ),
        ("objective=Foward", "objective is a part; 'Foward' is not one of its kind, did you mean 'Forward'?"),
        ("objective=3", "objective is a part; '3' is not one of its kind, known: Forward, PolicyGradient"),
        ("sigmas=Clip", "sigmas is a part; 'Clip' is not one of its kind, known: Sigmas"),
        ("credit.0=Bound", "credit.0: Bound needs a value for 'by'"),
        (
            "credit=Normalise",
            "credit is 'Normalise'; it must be a value of type [CreditStep, ...], such as [{",
        ),
        (
            'credit=[{"is": "Clip"}]',
            "credit.0 is a Clip, which has no method 'apply'; a credit step is one of Normalise",
        ),
        ("precision=fp8", "precision is 'fp8'; it must be 'fp32', 'bf16' or 'tf32'"),
        ("optimizer.lr=NaN", "optimizer.lr is NaN; it must be a finite number"),
        ("optimizer.lr=1e999", "optimizer.lr is Infinity; it must be a finite number"),
        ("optimizer.betas=[0.9, -Infinity]", "optimizer.betas.1 is -Infinity; it must be a finite number"),
        ('weights={"a": 1, "a": 2}', 'weights: "a" is given twice in one object; keep one'),
        ("group_size=" + "9" * 5000, "group_size: Exceeds the limit"),
        ("group_size.x=2", "'group_size.x' goes into a plain value; 'x' is not a field of it"),
        ("=2", "is not an assignment"),
    ],
)
def test_a_bad_override_is_one_line(assignment: str, message: str) -> None:
    assert message in line(FILES.override, Job(), [assignment])


def test_an_option_that_is_a_field() -> None:
    assert line(FILES.override, Job(), ["--group-size", "12"]) == (
        "--group-size is not an option; write group_size=12"
    )
    assert FILES.as_assignment("--lr", "1e-4") == "optimizer.lr=1e-4"
    assert FILES.as_assignment("--out", "x") is None


def test_show_lists_every_value_in_the_order_of_the_fields() -> None:
    job = Job(extra=Forward(), snapshots={"old": Sigmas()}, weights={"a": 1.0}, rewards=())
    assert FILES.show(job) == [
        ("name", '"job"'),
        ("group_size", "24"),
        ("sigmas", "Sigmas"),
        ("sigmas.num_steps", "10"),
        ("sigmas.shift", "3.0"),
        ("objective", "PolicyGradient"),
        ("objective.trust", "Clip"),
        ("objective.trust.clip_range", "0.0001"),
        ("objective.couples", "false"),
        ("extra", "Forward"),
        ("extra.beta", "1.0"),
        ("credit.0", "Normalise"),
        ("credit.0.eps", "0.0001"),
        ("credit.0.std", '"group"'),
        ("rewards", "[]"),
        ("snapshots.old", "Sigmas"),
        ("snapshots.old.num_steps", "10"),
        ("snapshots.old.shift", "3.0"),
        ("weights", '{"a": 1.0}'),
        ("optimizer", "Optimizer"),
        ("optimizer.lr", "0.0001"),
        ("optimizer.betas", "[0.9, 0.999]"),
        ("precision", '"fp32"'),
        ("most", '"all"'),
    ]


def test_what_is_shown_can_be_typed() -> None:
    shown = recipe_io.show(mix_grpo())
    again = recipe_io.override(
        mix_grpo(), ["topology.at=AllSteps", "group_size=4", "objective=NFT", "optimizer.lr=1"]
    )
    # A reward has no default function, so its name alone makes none.
    lines = [f"{path}={text}" for path, text in shown if text != "RewardTerm"]
    assert recipe_io.override(again, lines) == mix_grpo()


# -------------------------------------------------------------------------------------------- safety


@pytest.mark.parametrize("name", ["mix_grpo", "sd3.5-medium", "a", "A+b-1_2.x", "-x"])
def test_names_of_folders(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a b", "a\n", "/tmp/x", "C:x", "\u00e4"]
)
def test_names_that_leave_the_folder(name: str) -> None:
    assert "it names a run's folder" in line(check_name, name)


def test_a_recipes_name_is_checked_where_it_comes_in(tmp_path: Path) -> None:
    assert "Recipe.name is '../x'" in line(recipe_io.override, mix_grpo(), ["name=../x"])
    recipe_io.save_recipe(replace(mix_grpo(), name="../x"), tmp_path / "recipe.json")
    assert "Recipe.name is '../x'" in line(recipe_io.load_recipe, tmp_path)


def test_code_that_a_run_file_names_is_listed_without_importing_it(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    values = written(
        objective={"is": "evil_pkg.parts:Mine", "inner": {"is": "evil_pkg.parts:Outer.Inner"}},
        rewards=[
            {"is": "Term", "function": "os:system"},
            {"is": "Term", "function": "flowgrpo_fast.rewards.rules:ink"},
            {"is": "Term", "function": "flowgrpo_fast_evil.rules:ink"},
            {"is": "Term", "function": "os:system"},
            {"is": "Term", "function": "a file-name.py:f"},
        ],
        model="their.models:load",
        prompts="a photo: of a cat",
        path="C:\\models",
        url="http://host:80/x",
        weights={"scores.mod:aesthetic": 1.0},
    )
    file.write_text(json.dumps(values))
    assert named_code(read_json(file)) == [
        "evil_pkg.parts:Mine",
        "evil_pkg.parts:Outer.Inner",
        "os:system",
        "flowgrpo_fast_evil.rules:ink",
        "a file-name.py:f",
        "their.models:load",
        "scores.mod:aesthetic",
    ]
    assert not [name for name in sys.modules if name.startswith("evil_pkg")]
    assert named_code(recipe_io.to_dict(mix_grpo())) == []
