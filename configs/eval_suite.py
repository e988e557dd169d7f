"""python -m eval.run --config=configs/eval_suite.py --model=native:M --adapter=A --workdir=D

Runs the complete suite in strict mode, for scores that support claims.
The items are those of the released parquet (`data.prepare import`), or of benchmarks in their own
formats (`data.prepare eval_items`); separate several files with commas. With a judge:
--config.judge.endpoint=NAME@URL.
"""

from ml_collections import ConfigDict, config_dict

from medmax_jax.configs import base


def service() -> ConfigDict:
    """Return the request settings of an endpoint, of a model or a judge."""
    service = ConfigDict()
    service.key_env = "OPENAI_API_KEY"  # environment variable with the key; empty: no key is sent
    service.parameters = '{"temperature": 0}'  # a JSON object, sent as it is, part of the cache key
    service.price_in = config_dict.placeholder(float)  # USD per million tokens; unset: no cost
    service.price_out = config_dict.placeholder(float)  # USD per million output tokens
    service.max_usd = config_dict.placeholder(float)  # no costlier run starts; needs both prices
    service.credentialed_hosts = ""  # host:port,... that MIMIC-CXR may be sent to; none by default
    service.concurrency = 8  # concurrent calls
    service.per_minute = 0  # calls that may start in a minute; 0: no limit
    service.timeout_s = 120.0  # of one call
    service.retries = 6  # of one call, at 429 and at failures of the server
    service.max_wait_s = 90.0  # between two retries
    service.max_reply_bytes = 4_000_000  # a longer reply is an error
    return service


def get_config() -> ConfigDict:
    whole = base.get_config()
    config = ConfigDict()
    config.model = ""  # KIND:WHERE; set by --model
    config.adapter = ""  # of config.model; empty: none
    config.questions = "eval_items/items.jsonl"  # JSONL files in the released schema
    config.images = "eval_items"  # folder that image_path of all of them is relative to
    config.split = "test"  # of the embedded sample only
    config.counts = ConfigDict()  # items of each family, alternating groups; -1: all, 0: none
    config.counts.vqa_closed = -1
    config.counts.vqa_mcq = -1
    config.counts.vqa_rationale = -1
    config.counts.vqa_open = -1
    config.counts.captioning = -1
    config.counts.image_generation = -1  # the MedMax release takes the first 100 rows of each
    config.counts.multimodal = -1
    config.counts.visual_chat = -1
    config.counts.vqa_numeric = -1
    config.counts.image_editing = -1
    config.counts.multimodal_generation = -1
    config.mode = "strict"  # of generation: 16 tokens for a closed answer or a letter
    config.prompt = "sft"  # wording; chameleon: a base model, chat: a chat model (tasks/items.py)
    config.shots = 0  # examples before a question; -1: those that a row brings (tasks/shots.py)
    config.perturbation = ""  # of the images shown; kvasir: as Kvasir-VQA-x1 publishes its own
    config.baselines = "constant,majority,random"  # baseline scores next to every score
    config.probes = "blank,shuffled,swapped,rotated"  # is the image used, is the order used
    config.probe_families = (  # families to probe
        "vqa_closed,vqa_mcq,vqa_open,vqa_numeric,captioning,visual_chat"
    )
    config.options = True  # also: likelihoods of the options, and calibration from them
    config.verbalized_confidence = False  # also: ask how confident each closed and mcq answer is
    config.scorers = ""  # of images: biomedclip:FOLDER is the published score
    config.train_records = ""  # folder of training records, for contamination; empty: unknown
    config.train_model = ""  # model folder that wrote them; empty: the evaluated one
    config.judge = ConfigDict()
    config.judge.endpoint = ""  # NAME@URL, a pinned name; empty: no judge, which is reported
    config.judge.repeats = 3  # votes on each answer
    config.judge.attempts = 3  # calls for one vote until a reply can be parsed; then unscored
    config.judge.seed = 0  # of the votes
    config.judge.tokens_out = 200  # of a reply, for the price estimate
    config.judge.paper = False  # True: also use the release's messages, for its score
    config.judge.read_unparsed = False  # True: also let it read closed answers that are unparsed
    config.judge.service = service()  # request settings of the judge
    config.service = service()  # request settings of a model, for --model=endpoint:NAME@URL
    # Concurrent text answers, a third as many with images. A KV-cache slot of 7B in bf16 is 0.5 MiB
    # per token: 24 of 2,100 tokens are 25 GiB, and 8 with three slots of 4,096 each 48 GiB.
    config.rows = 24  # so that one device of 80 GB holds a 7B base and its answers
    config.window = 1_024  # items passed to a model at once; a kill loses fewer than these
    config.seed = 0  # of choices, probes and resampling
    config.resamples = 2_000  # of each interval
    config.mesh = whole.mesh  # axes of the devices
    config.sample = whole.sample  # temperatures and guidance; images are sampled
    config.sample.text_greedy = True  # text is not sampled
    config.sample.repetition_penalty = 1.0  # 1.2 would penalize a "yes" of the question
    config.sample.max_gen_len = 1_024  # maximum tokens of an answer, whatever its family allows
    config.sample.budget = "answer"  # over the complete answer, with or without images
    return config.lock()
