"""megascale: pretraining of GPT and BERT at scale, with every layout proven to be the same run."""

__version__ = "0.1.0"
