"""Generation: plain functions `(predict, x, *, steps, ...) -> tensor`; `predict` is what training trained."""
