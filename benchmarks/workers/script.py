"""The script of the model's page in transformers' documentation, for one token: FOLDER PICTURE QUESTION DTYPE."""

import sys

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder, picture, question, dtype = sys.argv[1:]
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype), device_map="cpu")
processor = AutoProcessor.from_pretrained(folder)
content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
out = model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
