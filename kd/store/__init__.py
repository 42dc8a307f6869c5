"""The teacher store: every distribution of the teacher, exact and small, and a manifest that says what it is.

The teacher's logits are head(norm(h)), and its final hidden state h is several times smaller than its logits, so a
store keeps h (float16) for every token of every example; norm and head are kept once per teacher, beside the stores.
A store of kind `logits`, imported from the original's files, holds the logits themselves. Format: docs/store.md.
"""
