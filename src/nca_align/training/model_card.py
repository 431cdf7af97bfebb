"""The model card that a trainer writes beside its model."""

import textwrap

PAPER = {
    "title": "Noise Contrastive Alignment of Language Models with Explicit Rewards",
    "id": "2402.05369",
    "citation": textwrap.dedent("""\
        @inproceedings{chen2024noise,
            title     = {{Noise Contrastive Alignment of Language Models with Explicit Rewards}},
            author    = {Huayu Chen and Guande He and Lifan Yuan and Ganqu Cui and Hang Su and Jun Zhu},
            year      = 2024,
            booktitle = {Advances in Neural Information Processing Systems 37 (NeurIPS 2024)},
            eprint    = {2402.05369},
        }"""),
}
