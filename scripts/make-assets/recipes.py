#!/usr/bin/env python3
"""Writes the fine-tuning dataset: short plain recipes, composed by a small grammar.

The sentences are written for this project; the script combines ingredients,
measures, and steps into rows

    {"prompt": "Leek and barley broth with mint, for four.", "completion": " Take four leeks ..."}

Dishes, not rows, are held out: no validation prompt occurs in training, whatever
its number of guests.

    recipes.py OUT    writes OUT/train.jsonl and OUT/valid.jsonl
"""

import argparse
import hashlib
import json
import random
from pathlib import Path

# what is counted, one per guest, how the text speaks of it, how it is prepared
VEGETABLES = {
    "leek": ("leeks", "leeks", "Wash the leeks and cut them into rings."),
    "onion": ("onions", "onions", "Peel the onions and chop them."),
    "carrot": ("carrots", "carrots", "Scrape the carrots and cut them into rounds."),
    "cabbage": ("small cabbages", "cabbage", "Shred the cabbage and wash it well."),
    "cucumber": ("cucumbers", "cucumbers", "Peel the cucumbers and cut them small."),
    "turnip": ("turnips", "turnips", "Peel the turnips and cut them into cubes."),
    "mushroom": ("cups of mushrooms", "mushrooms", "Wipe the mushrooms and cut them in half."),
}
GRAINS = {
    "barley": ("cups of barley", "barley", "Wash the barley in cold water."),
    "lentil": ("cups of lentils", "lentils", "Pick over the lentils and wash them."),
    "bean": ("cups of beans", "beans", "Soak the beans overnight and drain them."),
    "rice": ("cups of rice", "rice", "Wash the rice until the water is clear."),
    "pea": ("cups of dried peas", "peas", "Soak the peas for an hour and drain them."),
}
MEATS = {
    "lamb": ("pounds of lamb", "lamb", "Cut the lamb into pieces and salt it."),
    "beef": ("pounds of beef", "beef", "Cut the beef into strips and salt it."),
    "chicken": ("chicken legs", "chicken", "Salt the chicken and rub it with oil."),
    "fish": ("white fish", "fish", "Clean the fish and dry it with a cloth."),
}
FRUITS = {
    "fig": ("cups of figs", "figs", "Chop the figs."),
    "apple": ("apples", "apples", "Peel the apples and cut them thin."),
    "almond": ("cups of almonds", "almonds", "Grind the almonds."),
    "raisin": ("cups of raisins", "raisins", "Soak the raisins in warm water."),
    "pear": ("pears", "pears", "Peel the pears and cut them into quarters."),
    "plum": ("plums", "plums", "Stone the plums and cut them in half."),
}
HERBS = ["parsley", "thyme", "mint", "dill", "garlic"]
NUMBERS = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight"]
GUESTS = [2, 4, 6]


def count(item, number):
    return f"{NUMBERS[number]} {item[0]}"


def broth(draw, vegetable, grain, herb, guests):
    first, second = VEGETABLES[vegetable], GRAINS[grain]
    return [
        f"Take {count(first, guests)}, {count(second, guests)}, some {herb} and a little butter.",
        first[2], second[2],
        f"Melt the butter in a large pot, add the {first[1]} and cook them gently."
        if first[1].endswith("s") else
        f"Melt the butter in a large pot, add the {first[1]} and cook it gently.",
        f"Add the {second[1]} and {NUMBERS[guests + 2]} cups of water, and boil for {draw(['half an hour', 'one hour'])}.",
        f"Season with salt, pepper and {herb}.",
        draw(["Serve hot with bread.", "Serve in warm bowls."]),
    ]


def stew(draw, meat, vegetable, herb, guests):
    first, second = MEATS[meat], VEGETABLES[vegetable]
    return [
        f"Take {count(first, guests)}, {count(second, guests)}, some {herb} and a little oil.",
        first[2], second[2],
        f"Heat the oil in a heavy pan and brown the {first[1]} on all sides.",
        f"Add the {second[1]}, {NUMBERS[guests]} cups of water and the {herb}.",
        f"Cover the pan and stew over a low fire for {draw(['one hour', 'two hours'])}.",
        draw(["Serve with rice.", "Serve with bread."]),
    ]


def cake(draw, first_fruit, second_fruit, sweet, guests):
    first, second = FRUITS[first_fruit], FRUITS[second_fruit]
    return [
        f"Take {count(first, guests)}, {count(second, guests)}, {NUMBERS[guests]} eggs, flour, butter and {sweet}.",
        first[2], second[2],
        f"Beat the butter with the {sweet}, then stir in the eggs and the flour.",
        f"Fold in the {first[1]} and the {second[1]}, and pour into a greased pan.",
        f"Bake in a hot oven for {draw(['half an hour', 'one hour'])}.",
        draw(["Let it cool before you cut it.", "Serve warm with cream."]),
    ]


def salad(draw, vegetable, fruit, herb, guests):
    first, second = VEGETABLES[vegetable], FRUITS[fruit]
    return [
        f"Take {count(first, guests)}, {count(second, guests)}, some {herb}, oil and vinegar.",
        first[2], second[2],
        f"Mix the {first[1]} and the {second[1]} in a wide bowl.",
        f"Stir the oil and vinegar with salt and chopped {herb}, and pour it over.",
        draw(["Let it stand for half an hour.", "Serve at once."]),
    ]


SWEETS = ["honey", "sugar"]
DISHES = [
    *(("broth", broth, a, b, c) for a in VEGETABLES for b in GRAINS for c in HERBS),
    *(("stew", stew, a, b, c) for a in MEATS for b in VEGETABLES for c in HERBS),
    *(("cake", cake, a, b, c) for a in FRUITS for b in FRUITS if a != b for c in SWEETS),
    *(("salad", salad, a, b, c) for a in VEGETABLES for b in FRUITS for c in HERBS),
]


def row(dish, guests, random_state):
    kind, make, first, second, third = dish
    text = " ".join(make(random_state.choice, first, second, third, guests))
    prompt = f"{first.capitalize()} and {second} {kind} with {third}, for {NUMBERS[guests]}."
    return {"prompt": prompt, "completion": f" {text}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for train.jsonl and valid.jsonl")
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--valid", type=int, default=60)
    options = parser.parse_args()

    key = lambda dish: hashlib.sha256(" ".join(str(part) for part in (dish[0], *dish[2:])).encode()).digest()
    shuffled = sorted(DISHES, key=key)
    # A validation dish's two main ingredients never meet in a training dish of its kind.
    held_out, pairs = [], set()
    for dish in shuffled:
        if len(held_out) < options.valid and (dish[0], *dish[2:4]) not in pairs:
            held_out.append(dish)
            pairs.add((dish[0], *dish[2:4]))
        if len(pairs) >= 20:
            break
    held_out = [dish for dish in shuffled if (dish[0], *dish[2:4]) in pairs][: options.valid]
    kept = [dish for dish in shuffled if (dish[0], *dish[2:4]) not in pairs][: options.train]
    options.out.mkdir(parents=True, exist_ok=True)
    for name, dishes in (("train", kept), ("valid", held_out)):
        random_state = random.Random(name)
        rows = [row(dish, random_state.choice(GUESTS), random_state) for dish in dishes]
        path = options.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        print(f"{path}: {len(rows)} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
