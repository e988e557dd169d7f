"""Contains the training step, its inputs and the parts of a run around it.

batch          Defines the batch of one training step, its counts, and the interface of a batch
               loader.
cross_entropy  Computes cross-entropy over the full vocabulary without storing logits or unused
               gradients.
fisher         Measures the empirical Fisher information of the adapters from gradients of single
               documents.
log_writer     Writes the metrics and the log of a run, and measures its seconds by purpose.
loss           Computes the objective, the sum of weight x negative log-likelihood, and sums for
               reports.
lpips          Computes LPIPS, the perceptual distance of Zhang et al. 2018 on frozen AlexNet or
               VGG16.
metrics        Sums what steps count over an interval (clu), and computes the means for reports.
optimizer      Builds AdamW with a global-norm clip, linear warm-up and cosine decay.
reporting      Reports on a run: run summary, metrics, held-out losses, documents of non-finite
               batches.
samples        Writes samples of the model in training for held-out prompts: D/samples/000300.html.
setup          Starts a run: checks before anything is loaded, the lock, the state to resume from.
stages         Divides a run into its stages: which one a step belongs to, its schedule, and what it
               trains.
step           Defines one training step and one evaluation step as pure functions of state and
               batch.
"""
