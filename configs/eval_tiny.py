"""python -m eval.run --config=configs/eval_tiny.py --workdir=D

Evaluates the shipped model and its adapter on the held-out half of the embedded images.
It takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict, config_dict

from medmax_jax.configs import base


def service() -> ConfigDict:
    """Return the request settings of an endpoint, of a model or a judge."""
    return ConfigDict(
        dict(
            key_env="",  # name of the environment variable with the API key; empty: no key
            parameters='{"temperature": 0}',  # a JSON object, sent as it is. max_tokens or
            # max_completion_tokens in it replaces the limit of each family; null: send none
            price_in=config_dict.placeholder(float),  # USD per million tokens
            price_out=config_dict.placeholder(float),
            max_usd=config_dict.placeholder(float),  # costlier runs do not start; needs both prices
            credentialed_hosts="",  # host:port,... that credentialed data may be sent to
            concurrency=8,  # concurrent calls
            per_minute=0,  # calls that may start in a minute; 0: no limit
            timeout_s=120.0,  # of one call
            retries=6,  # of one call
            max_wait_s=90.0,  # between two retries
            max_reply_bytes=4_000_000,
        )
    )


def get_config() -> ConfigDict:
    whole = base.get_config()
    config = ConfigDict()
    config.model = "native:medmax_jax/tiny"  # used without --model
    config.adapter = "medmax_jax/tiny_adapter"  # of config.model; empty: none
    config.questions = "sample"  # or JSONL files in the released schema, separated by commas
    config.images = ""  # folder that image_path is relative to; empty: that of the first file
    config.split = "test"  # of the sample
    config.counts = ConfigDict(  # items of each family, alternating groups; -1: all
        dict(
            vqa_closed=-1,
            vqa_mcq=-1,
            vqa_rationale=-1,
            vqa_open=-1,
            captioning=-1,
            image_generation=16,
            multimodal=8,
            visual_chat=-1,
            vqa_numeric=-1,
            image_editing=-1,
            multimodal_generation=-1,
        )
    )
    config.mode = "strict"  # of generation; paper: the MedMax release's prompts, with its limits
    config.prompt = "sft"  # the release's sft, chameleon or default; chat: for chat models
    config.shots = 0  # examples before a question; -1: those that a row brings (tasks/shots.py)
    config.perturbation = ""  # of the images shown; kvasir: as Kvasir-VQA-x1 publishes its own
    config.baselines = "blind,constant,majority,random"  # blind: see eval/models/baselines.py
    config.probes = "blank,shuffled,swapped,rotated"  # the same questions with changed inputs
    config.probe_families = (  # families to probe
        "vqa_closed,vqa_mcq,vqa_open,vqa_numeric,captioning,visual_chat"
    )
    config.options = True  # also: the likelihoods of the options of closed and mcq questions
    config.verbalized_confidence = False  # also: ask how confident each closed and mcq answer is
    config.scorers = ""  # of images: efficientnet_lite0:WHEEL, biomedclip:FOLDER
    config.train_records = ""  # folder of training records; empty: contamination unknown
    config.train_model = ""  # model folder that wrote them; empty: the evaluated one
    config.judge = ConfigDict(
        dict(
            endpoint="",  # MODEL@URL; empty: no judge
            repeats=3,  # votes on each answer
            attempts=3,  # calls for one vote until a reply can be parsed
            seed=0,
            tokens_out=200,  # of a reply, for the estimate
            paper=False,  # also use the release's messages, for the score of the paper
            read_unparsed=False,  # also let it read closed answers that cannot be parsed
            service=service(),
        )
    )
    config.service = service()  # for --model=endpoint:NAME@URL
    config.rows = 32  # prompts at once
    config.window = 256  # items passed to a model at once
    config.view = ""  # of the images shown: released or pad; empty: as the model was trained
    config.seed = 0  # of the choice of items, of swapping, and of the resampling
    config.resamples = 2_000
    config.mesh = whole.mesh
    config.sample = whole.sample
    config.sample.max_gen_len = 96  # the longest answer of the sample has about 80 tokens
    config.sample.repetition_penalty = 1.0  # 1.2 would penalize a "yes" of the question
    return config.lock()
