"""Distillation objectives as plain tensor maths: no models, no I/O, no imports from the rest of llmdistill.

An objective is a function `(student_logits [..., V], teacher evidence ...) -> per-token loss [...]`.
`divergences` takes the teacher's logits, `sparse` its top-k, `policy` the log-probs of sampled tokens, and so do
`f_policy`, `power` and `baseline`; `labels` takes the tokens of the data. `composed` makes objectives of others,
`selection` says which rows count, `layers` compares hidden states; `streaming` runs any of them over the vocabulary
projection in chunks of tokens.
"""
