"""Defines every field with its source; the values are Chameleon/Anole 7B and the MedMax recipe.

The recipe is the published one. This file is not run by itself: other files start from its
`get_config()`.
"""

from ml_collections import ConfigDict

from medmax_jax.configs import sampling


def get_config() -> ConfigDict:
    config = _model_config()
    config.data = ConfigDict(
        dict(
            train="records/train",
            validation="records/validation",
            document_limit=2_048,  # MedMax training/data.py truncates here; ours omits them
            seq_len=2_048,
            batch_size=8,  # as in the paper
            pack=True,
            mask="answers",
            condition_dropout=dict(text=0.0, image=0.0, all=0.0),  # off, as released
            seed=0,
            plan="",
        )
    )
    config.mixing = ConfigDict(
        dict(  # each document once per epoch, as in the MedMax release
            by="source",
            unit="documents",
            weights="",
            image_centric=False,
            image_window=256,  # two steps of 8 rows of 16,384 tokens: larger windows pack better
            leave_out="",
            pseudo=True,  # of records that have documents with a generated answer
            fraction=1.0,
            fraction_seed=0,
        )
    )
    _add_optim(config)
    config.train = ConfigDict(
        dict(
            trains="lora",
            init_from="",
            steps=1_000,
            loss_weight="document",
            residual_dropout=0.0,  # Chameleon's SFT: 0.05
            seed=0,
            prng_impl="threefry2x32",
            compile="default",
            log_every=10,
            eval_every=500,
            fisher_every=0,  # spectrum of single documents' gradients; the log states its cost
            samples=0,
            checkpoint_every=500,
            keep=2,
        )
    )
    config.stages = ()  # none, as in the paper
    return config.lock()


def _add_optim(config: ConfigDict) -> None:
    """Add the section of the optimizer."""
    config.optim = ConfigDict(
        dict(  # peak and warm-up: the paper; the rest: HF Trainer defaults, which it did not change
            peak_lr=1e-4,
            warmup_ratio=0.1,
            final_lr_ratio=0.0,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            clip_norm=1.0,
            skip_window=0,  # off, as released; MaxText's are 128 and 6
            skip_factor=6.0,
            accumulate=1,
            schedule="run",
        )
    )


def _model_config() -> ConfigDict:
    """Return the sections of the networks, the adapters, the loss, devices and sampling."""
    config = ConfigDict()
    config.vocab = ConfigDict(dict(size=65_536, image_codes=8_192, text_start=16_384))
    config.model = ConfigDict(
        dict(  # params.json of Chameleon-7B
            hidden_size=4_096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            intermediate_size=11_008,
            context_length=4_096,
            rope_theta=10_000.0,
            rms_norm_eps=1e-5,
            qk_norm_eps=1e-5,
            qk_norm_shards=1,
            swin_norm=False,
            param_dtype="bfloat16",  # fp16 overflows: the residual stream reaches about 9e4
            quant="none",
            compute_dtype="bfloat16",
            remat="attn",
            attention="xla",
        )
    )
    config.vq = ConfigDict(
        dict(  # vqgan.yaml of Chameleon
            image_size=512,
            channels=128,
            channel_mult=(1, 1, 2, 2, 4),
            num_res_blocks=2,
            z_channels=256,
            embed_dim=256,
            num_codes=8_192,
            norm_groups=32,  # fixed in the code of taming-transformers
            view="released",  # the center square; Chameleon's paper pads the images of prompts
            answer_view="released",  # as in the paper and in the release
        )
    )
    config.loss = ConfigDict(  # as released: no factors, no z-loss
        dict(weights=dict(text=1.0, image=1.0, tasks="", pseudo=1.0), z=dict(text=0.0, image=0.0))
    )
    config.lora = ConfigDict(dict(rank=16, alpha=16.0, dropout=0.05))  # MedMax training/train.py
    config.mesh = ConfigDict(dict(data=1, fsdp=1, tp=1))
    config.sample = ConfigDict(sampling.SETS["medmax_eval"])
    return config
