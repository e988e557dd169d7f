"""What one training step is made of, and what surrounds it.

batch          The batch of one training step, its counts, and what training asks of whoever makes
               batches.
cross_entropy  Cross-entropy over the whole vocabulary: no logits in memory, no gradient that
               nobody asked for.
log_writer     Where a run's numbers go, and its seconds by purpose.
loss           The objective: sum over positions of weight x negative log-likelihood; its parts for
               reports.
lpips          LPIPS, the perceptual distance of Zhang et al. 2018 on frozen AlexNet or VGG16
               features.
metrics        What a step counts: sums over an interval (clu), and the means of them that are
               reported.
optimizer      AdamW behind a global-norm clip, with linear warm-up and cosine decay.
reporting      What a run says of itself: the banner, a line each N steps, held-out losses, bad
               batches by name.
run_files      The files of a run that it can do without: its log and its numbers, written and read
               again.
samples        What the model in training writes for a few held-out prompts: D/samples/000300.html.
setup          How a run starts: what is refused before anything is loaded, the lock, the state to
               go on from.
step           One training step and one evaluation step: pure functions of (state, frozen weights,
               batch).
"""
