"""Generation: plain functions `(predict, x, points, ...) -> tensor`; `predict` is what training trained, as x0."""
