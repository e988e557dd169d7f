"""Checkpoints in and out: Meta, Hugging Face, PEFT and this project's own layout.

__main__            Checkpoints of the Chameleon family from one layout to another, exact in both
                    directions.
adapters            LoRA adapters: PEFT's layout, this project's, and a training run's.
check               Whether a checkpoint is what was published, and computes here what it computes
                    in torch.
convert             One conversion from a path to a path: read, merge, quantise, write; whole or
                    not at all.
hf                  Hugging Face's layout of the Chameleon family.
inspect_checkpoint  What a checkpoint is, from its headers and a few percent of its weights.
meta                Meta's layout, as Chameleon, Anole and MedMax are published.
model_card          The model card (README.md) of what was converted: what it is, its data, and
                    under which terms.
native              This project's layout: a model folder.
safetensors_stream  Weight files of a folder: read by ranges, written as a stream; one tensor in
                    memory at most.
state_dict          The form that every layout is read into and written from: named tensors not yet
                    read.
torch_reference     The half of `check` that runs in a Python with torch and transformers; nothing
                    of ours in it.
vqgan               The VQGAN's tensors: taming-transformers' names and layout beside this
                    project's.
"""
