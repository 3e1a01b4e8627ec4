#!/usr/bin/env python3
"""Makes sampling_goldens.json: probabilities after transformers' logits processors, on fixed logits.

Penalties on presence and frequency are not in transformers; they are computed here as OpenAI's API
defines them (over the completion alone). Made with transformers 5.23.0 and torch 2.15.0.
"""
import json
import pathlib

import torch
from transformers import (LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor,
                          SequenceBiasLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper,
                          TopPLogitsWarper)

VOCAB = 48
PROMPT = [3, 7, 7, 11, 40]
GENERATED = [11, 2, 2, 2, 19, 30]

# Every filter alone at several strengths, then together; penalties with and without filters.
CASES = [
    {}, {"temperature": 0.3}, {"temperature": 2.5}, {"temperature": 0.05},
    {"top_k": 1}, {"top_k": 7}, {"top_k": 47}, {"top_k": 48}, {"top_k": 1000},
    {"top_p": 0.05}, {"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 0.999},
    {"min_p": 0.02}, {"min_p": 0.3}, {"min_p": 0.99},
    {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.8, "top_k": 12},
    {"top_k": 10, "top_p": 0.7}, {"top_k": 5, "top_p": 0.97, "min_p": 0.2},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.85, "min_p": 0.05},
    {"top_p": 0.6, "min_p": 0.5}, {"temperature": 0.5, "min_p": 0.1},
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.8}, {"repetition_penalty": 2.0},
    {"repetition_penalty": 1.2, "temperature": 0.8, "top_k": 15, "top_p": 0.9},
    {"logit_bias": {"5": 3.5, "11": -2.0, "47": 100.0}}, {"logit_bias": {"1": -100.0, "0": 1.25}},
    {"logit_bias": {"5": 3.5, "0": -1.0}, "top_p": 0.75},
    {"presence_penalty": 1.5}, {"frequency_penalty": 0.7}, {"presence_penalty": -1.0},
    {"presence_penalty": 0.4, "frequency_penalty": 0.9, "top_k": 9},
    {"repetition_penalty": 1.1, "presence_penalty": 0.6, "frequency_penalty": -0.3,
     "temperature": 0.9, "top_p": 0.95},
]


def processors(case):
    """In the order of transformers' generate."""
    chain = LogitsProcessorList()
    if "logit_bias" in case:
        chain.append(SequenceBiasLogitsProcessor(
            [[[int(token)], bias] for token, bias in case["logit_bias"].items()]))
    if "repetition_penalty" in case:
        chain.append(RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]))
    return chain


def warpers(case):
    chain = LogitsProcessorList()
    if "temperature" in case:
        chain.append(TemperatureLogitsWarper(case["temperature"]))
    if "top_k" in case:
        chain.append(TopKLogitsWarper(case["top_k"]))
    if "top_p" in case:
        chain.append(TopPLogitsWarper(case["top_p"]))
    if "min_p" in case:
        chain.append(MinPLogitsWarper(case["min_p"]))
    return chain


def main():
    torch.manual_seed(5)
    rows = [[round(x, 3) for x in (torch.randn(VOCAB) * scale).tolist()] for scale in (2.0, 5.0)]
    ids = torch.tensor([PROMPT + GENERATED])
    cases = []
    for row, logits in enumerate(rows):
        for case in CASES:
            scores = processors(case)(ids, torch.tensor([logits], dtype=torch.float64))
            for token in set(GENERATED):
                scores[0, token] -= (case.get("presence_penalty", 0)
                                     + case.get("frequency_penalty", 0) * GENERATED.count(token))
            probabilities = torch.softmax(warpers(case)(ids, scores), -1)[0].tolist()
            cases.append({"row": row, "params": case,
                          "probabilities": [float(f"{p:.9g}") for p in probabilities]})
    text = json.dumps({"prompt": PROMPT, "generated": GENERATED, "logits": rows, "cases": cases},
                      separators=(",", ":"))
    out = pathlib.Path(__file__).resolve().parent / "sampling_goldens.json"
    out.write_text(text + "\n")
    print(len(text))


main()
