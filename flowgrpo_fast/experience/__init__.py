"""Experience: where the samples of a training step come from. Parts nest: `Scouts(inner=Replayed())`."""
