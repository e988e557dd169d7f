"""Defines the sampling settings of the released programs, by name.

| name        | source                                       | differs in                          |
|-------------|----------------------------------------------|-------------------------------------|
| meta        | options of Meta's Chameleon release          | temperature 0.7; BOI ends an answer |
| medmax      | options of MedMax's (and Anole's) copy of it | temperature 1.0                     |
| medmax_eval | MedMax's evaluation, chameleon_generate      | greedy text                         |

Both programs restart the count of max_gen_len after each image; medmax_eval here counts it over the
complete answer, so that an answer's length is limited by its task. The modality is not a sampling
setting: Meta's default is --mode=text, MedMax's --mode=mixed.
"""

_BOTH = dict(
    text_top_p=0.9,
    repetition_penalty=1.2,
    image_temperature=0.7,
    image_top_p=0.9,
    image_greedy=False,
    guidance_scale_text=3.0,
    guidance_scale_image=1.2,
    jacobi_window=0,
    jacobi_rule="gumbel",
    jacobi_init="vertical",
    seed=42,  # MedMax sets it before each suite; Meta's has none
)
_MEDMAX = _BOTH | dict(text_temperature=1.0, boi_ends=False)

SETS = {
    "meta": _BOTH
    | dict(text_temperature=0.7, text_greedy=False, max_gen_len=4_096, budget="segment")
    | dict(boi_ends=True),  # extra_eos_tokens = ["<racm3:break>"]
    "medmax": _MEDMAX | dict(text_greedy=False, max_gen_len=4_096, budget="segment"),
    "medmax_eval": _MEDMAX | dict(text_greedy=True, max_gen_len=1_024, budget="answer"),
}
