"""Latents -> images -> scores by all rewards of a run, of which some run elsewhere meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowgrpo_fast.rewards.terms import Reward, Seen, scored
from flowgrpo_fast.rewards.workers import RewardWorkers
from flowgrpo_fast.types import PreviewScore, PromptSet, Scores


class Scorer:
    """Scores samples by a run's rewards.

    Args:
        terms: the rewards, at least one; `reward.resolve()` of each is called here.
        decode: latents `[B, *S]` to images `[B, C, H, W]` or videos `[B, F, C, H, W]`, fp32 in [0, 1].
        device: where scores are gathered.
        num_processes: at most so many rewards with where="process" run at a time.
    """

    def __init__(
        self,
        terms: Sequence[Reward],
        decode: Callable[[Tensor], Tensor],
        device: torch.device,
        num_processes: int = 1,
    ) -> None:
        self.terms = tuple(terms)
        self.decode = decode
        self.device = device
        for term in self.terms:
            term.resolve()
        elsewhere = any(term.where != "here" for term in self.terms)
        self.workers = RewardWorkers(num_processes) if elsewhere else None

    def start(self, x0: Tensor, asked: PromptSet, group: Tensor, num_groups: int) -> Scoring:
        """Begins to score finished samples `x0 [B, *S]`, whole groups; the host waits for no reward.

        Args:
            x0: the samples' latents.
            asked: one entry a sample.
            group: `[B]` int64, below `num_groups`.
            num_groups: how many there are.
        """
        if any(term.group_wise for term in self.terms):
            sizes = torch.bincount(group, minlength=num_groups).tolist()
            assert len(set(sizes)) == 1, f"groups of {sizes} samples; a group-wise reward needs whole ones"
        return Scoring(self, asked, group, num_groups, x0, None).start()

    def score(
        self, images: Tensor, asked: PromptSet, group: Tensor, num_groups: int, x0: Tensor | None = None
    ) -> Scores:
        """Scores of images that are decoded already, and stay as they are.

        Raises:
            ValueError: as `Scoring.result`.
        """
        return Scoring(self, asked, group, num_groups, x0, images, lent=True).start().result()

    def preview_score(self, asked: PromptSet) -> PreviewScore:
        """Scores x0 predictions of these prompts' candidates by the run's own rewards, weighted as in training."""
        places = torch.arange(len(asked))

        def total(x0_pred: Tensor) -> Tensor:
            group = places.repeat_interleave(len(x0_pred) // len(asked))
            return require_all(
                self.start(x0_pred, asked.rows(group), group.to(x0_pred.device), len(asked)).result()
            ).total

        return total

    def owners(self, scores: Scores) -> tuple[Reward, ...]:
        """The reward behind each objective, in the scores' order: its weight is the objective's."""
        by_name = {term.objective: term for term in self.terms}
        return tuple(by_name[name.partition("/")[0]] for name in scores.objectives)

    def with_gradient(self, seen: Seen) -> Tensor:
        """The weighted sum `[B]` fp32 of the differentiable rewards, with its gradient to `seen.images`.

        Raises:
            ValueError: none is differentiable, or as `RewardTerm.with_gradient`.
        """
        total = torch.zeros(len(seen), device=self.device)
        terms = [term for term in self.terms if term.differentiable]
        if not terms:
            labels = ", ".join(repr(term.label) for term in self.terms)
            raise ValueError(
                f"no reward of {labels} has a gradient; set RewardTerm.differentiable where one has"
            )
        for term in terms:
            total = total + term.weight * term.with_gradient(seen).to(self.device)
        return total

    def close(self) -> None:
        """Ends the processes of rewards, whatever they are at."""
        if self.workers is not None:
            self.workers.close()


@dataclass(slots=True, eq=False)
class Scoring:
    """The scores of some samples, those of rewards that run elsewhere under way."""

    scorer: Scorer
    asked: PromptSet  # one entry a sample
    group: Tensor
    num_groups: int
    latents: Tensor | None
    images: Tensor | None  # None until they are decoded
    lent: bool = False  # the images are somebody else's, and stay as they are
    elsewhere: dict[int, Future[Scores]] = field(default_factory=dict)  # by the reward's place
    num_shown: int = 0  # rewards that were given the samples already

    def start(self) -> Scoring:
        """Decodes, and submits what runs elsewhere; the host waits for nothing."""
        workers = self.scorer.workers
        if workers is not None:
            for place, term in enumerate(self.scorer.terms):
                if term.where != "here":
                    self.elsewhere[place] = workers.submit(term, self._seen(term))
        return self

    def result(self) -> Scores:
        """Every objective, unweighted, and the rewards' weighted sum; waits for what is under way.

        Raises:
            ValueError: a reward returned no numbers or the wrong shape, or a score is not finite.
        """
        device = self.scorer.device
        total = torch.zeros(len(self.asked), device=device)
        objectives: dict[str, Tensor] = {}
        signals: dict[str, Tensor] = {}
        valid: Tensor | None = None
        for place, term in enumerate(self.scorer.terms):
            running = self.elsewhere.get(place)
            with torch.no_grad():  # as in a thread or a process: nothing of a reward network is kept
                scores = scored(term, self._seen(term)) if running is None else running.result()
            named = {f"{term.objective}/{name}": values for name, values in scores.objectives.items()}
            for values in (scores.total, *named.values()):
                _require_finite(term, values, scores.valid)
            for name, values in (named or {term.objective: scores.total}).items():
                objectives[name] = _filled(values, scores.valid).to(device)
            signals |= {
                f"{term.objective}/{name}": value.to(device) for name, value in scores.signals.items()
            }
            if scores.valid is not None:
                own = scores.valid.to(device)
                valid = own if valid is None else valid & own
            total = total + term.weight * _filled(scores.total, scores.valid).to(device)
        self.images = None  # of one chunk at a time
        return Scores(_filled(total, valid), objectives, signals, valid)

    def _seen(self, term: Reward) -> Seen:
        """The samples for one reward, which may write to all of it: nobody else sees what it does.

        Images are copied while another reward has yet to see them: next to decoding, that is nothing.
        """
        if self.images is None:
            assert self.latents is not None
            with torch.no_grad():
                self.images = self.scorer.decode(self.latents)
            # A decoder that returns its input would let a reward write to the samples that are trained on.
            self.lent = self.images.untyped_storage().data_ptr() == self.latents.untyped_storage().data_ptr()
        self.num_shown += 1
        last = self.num_shown == len(self.scorer.terms)
        # What goes to a process from a device is copied on its way.
        own = (last and not self.lent) or (term.where == "process" and self.images.is_cuda)
        return Seen(
            images=self.images if own else self.images.clone(),
            prompts=list(self.asked.prompts),
            metadata=copy.deepcopy(list(self.asked.metadata)),
            source_images=list(self.asked.images) if self.asked.images else None,
            group=self.group.clone(),
            latents=None if self.latents is None else self.latents.clone(),
            num_groups=self.num_groups,
        )


def collect(scorings: Sequence[Scoring]) -> Scores:
    """The scores of all chunks, in their order.

    Raises:
        ValueError: as `Scoring.result`; a sample counts from the start of its chunk.
    """
    return Scores.joined([scoring.result() for scoring in scorings])


def require_all(scores: Scores) -> Scores:
    """The same scores, for who cannot do without one.

    Raises:
        ValueError: a sample has no score.
    """
    if scores.valid is not None and not scores.valid.all():
        missing = (~scores.valid).nonzero()[:, 0].tolist()
        raise ValueError(
            f"the rewards gave {len(missing)} of {len(scores.valid)} samples no score, sample {missing[0]} first; "
            "here every sample needs one"
        )
    return scores


def _filled(values: Tensor, valid: Tensor | None) -> Tensor:
    """The same with 0 where there is no score, so that nothing computed from it beside others is NaN."""
    return values if valid is None else torch.where(valid.to(values.device), values, 0.0)


def _require_finite(term: Reward, values: Tensor, valid: Tensor | None) -> None:
    finite = torch.isfinite(values)
    if valid is not None:
        finite |= ~valid.to(values.device)
    if not finite.all():
        sample = int((~finite).nonzero()[0])
        raise ValueError(f"reward {term.label!r} of sample {sample} is {float(values[sample])}")
