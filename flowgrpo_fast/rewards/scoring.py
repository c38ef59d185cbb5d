"""TEMPORARY."""

from __future__ import annotations

import torch

from flowgrpo_fast.rewards.workers import RewardWorkers
from flowgrpo_fast.types import Scores


class Scoring:
    def __init__(self, scorer, prompts, latents):
        self.scorer, self.prompts = scorer, prompts
        with torch.no_grad():
            self.images = scorer.decode(latents)
        self.elsewhere = {}
        for term in scorer.terms:
            if term.where != "here":
                self.elsewhere[term.label] = scorer.workers.submit(term, term.resolve(), self.images, prompts)

    def result(self):
        objectives = {}
        total = torch.zeros(len(self.prompts), device=self.scorer.device)
        for term in self.scorer.terms:
            running = self.elsewhere.get(term.label)
            with torch.no_grad():
                values = term.resolve()(self.images, self.prompts) if running is None else running.result()
            values = values.to(self.scorer.device, torch.float32)
            objectives[term.label] = values
            total = total + term.weight * values
        return Scores(total=total, objectives=objectives)


class Scorer:
    def __init__(self, terms, prompts, decode, device, num_processes):
        self.terms, self.prompts, self.decode, self.device = terms, prompts, decode, device
        self.workers = RewardWorkers(num_processes) if any(t.where != "here" for t in terms) else None

    @property
    def weights(self):
        return {t.label: t.weight for t in self.terms}

    def start(self, trajectory):
        d = trajectory.draws
        return Scoring(self, list(self.prompts.rows(d.prompt_index[d.group_id]).prompts), trajectory.x0)

    def preview(self, draws):
        prompts = list(self.prompts.rows(draws.prompt_index).prompts)

        def total(x0):
            n = len(x0) // len(prompts)
            return Scoring(self, [p for p in prompts for _ in range(n)], x0).result().total

        return total

    def close(self):
        if self.workers:
            self.workers.close()


def collect(scorings):
    return Scores.joined([s.result() for s in scorings])
