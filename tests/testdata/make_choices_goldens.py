#!/usr/bin/env python3
"""Multiple-choice log probabilities by transformers, summed as lm-evaluation-harness sums them
(TemplateLM._encode_pair, target_delimiter " ").

usage: make_choices_goldens.py MODEL_DIR choices.jsonl > golden.json
"""
import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def logprob(model, tokenizer, context, choice):
    stripped = context.rstrip()
    continuation = context[len(stripped):] + " " + choice
    whole, given = tokenizer.encode(stripped + continuation), tokenizer.encode(stripped)
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logprobs[i - 1, whole[i]].item() for i in range(len(given), len(whole)))


def main():
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    with open(sys.argv[2], encoding="utf-8") as lines:
        questions = [json.loads(line) for line in lines if line.strip()]
    rows, right, right_by_length = [], 0, 0
    for question in questions:
        choices = question["choices"]
        row = [logprob(model, tokenizer, question["context"], choice) for choice in choices]
        by_length = [value / len(choice) for value, choice in zip(row, choices)]
        right += row.index(max(row)) == question["answer"]
        right_by_length += by_length.index(max(by_length)) == question["answer"]
        rows.append(row)
    json.dump({"made_with": f"transformers {transformers.__version__}, fp32",
               "acc": right / len(questions), "acc_norm": right_by_length / len(questions),
               "logprobs": rows}, sys.stdout, indent=1)


main()
