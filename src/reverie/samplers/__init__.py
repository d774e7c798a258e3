"""Generation: plain functions `(predict, start, *, steps, ...) -> tensor`; `predict` is what training trained."""
