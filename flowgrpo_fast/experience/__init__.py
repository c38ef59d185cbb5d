"""Experience: where the samples of a training step come from. Parts nest: `Replayed(inner=Scouts(inner=Rollout()))`."""
