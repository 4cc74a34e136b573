"""Vocabularies of SentencePiece (BPE with scores) as GGUF files carry them, and what SentencePiece makes of texts.

    python make-sentencepiece.py        # writes golden-sentencepiece.json beside it; needs sentencepiece 0.2

The vocabularies are trained on sentences made up here: no text of others.
"""
import io
import json
import pathlib
import random

import sentencepiece

WORDS = """the a of and to in is that it was for on are with as his they at be this from have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so these would other
into has more her two like him see time could no make than first been its who now people my made over did down only way find use
may water long little very after words called just where most know get through back much before go good new write our used me man
too any day same right look think also around another came come work three word must because does part even place well such here
take why things help put years different away again off went old number great tell men say small every found still between name
größe straße naïve café Привет мир 東京 日本語 한국어 üben éclair""".split()


def corpus(rng):
    for _ in range(4000):
        words = rng.choices(WORDS, k=rng.randrange(3, 14))
        if rng.random() < 0.2:
            words.insert(rng.randrange(len(words)), str(rng.randrange(100000)))
        text = " ".join(words)
        yield text[0].upper() + text[1:] + rng.choice(".?!,;:")


KINDS = [("is_unknown", 2), ("is_control", 3), ("is_unused", 5), ("is_byte", 6)]


def vocabulary(name, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(random.Random(3)), model_writer=model, model_type="bpe", vocab_size=900,
        byte_fallback=True, character_coverage=0.9995, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, num_threads=1, minloglevel=2, **options)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    user = options.get("user_defined_symbols", [])
    kinds = []
    for i in range(sp.vocab_size()):
        kind = next((kind for check, kind in KINDS if getattr(sp, check)(i)), 1)
        kinds.append(4 if sp.id_to_piece(i) in user else kind)
    rng = random.Random(4)
    texts = ["Hello there, world!", "", " ", "  two  spaces ", "a\nb\n\nc\t.", "größe Straße naïve", "東京 and 日本語",
             "🙂 emoji 🙂🙂", "12345 67.8", "don't", "  lead", "trail  ", "\u00a0nbsp", "aaaaaaaaaaaaa", "the the   the",
             "e\u0301", "x" * 60, "Привет, мир", "\x00\x01", "Wordswordswords"]
    texts += list(corpus(rng))[:40]
    texts += ["".join(rng.choices("abcdefgh th e in er  .,üß東\n", k=30)) for _ in range(60)]
    ids = [sp.encode(text) for text in texts]
    return {"name": name, "add_space_prefix": options.get("add_dummy_prefix", True),
            "tokens": [sp.id_to_piece(i) for i in range(sp.vocab_size())],
            "scores": [round(sp.get_score(i), 6) for i in range(sp.vocab_size())], "kinds": kinds,
            "cases": [{"text": t, "ids": i, "decoded": sp.decode(i)} for t, i in zip(texts, ids)]}


out = {"made_with": f"sentencepiece {sentencepiece.__version__}",
       "vocabularies": [vocabulary("llama"),
                        vocabulary("gemma", add_dummy_prefix=False,
                                   user_defined_symbols=["▁▁", "▁▁▁", "▁▁▁▁", "\n\n", "<turn>"])]}
path = pathlib.Path(__file__).with_name("golden-sentencepiece.json")
path.write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n")
print(path.stat().st_size)
