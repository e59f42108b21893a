"""What the page to play with offers: prompts of each data set, and lessons, which set everything up."""

PROMPTS = {  # of the test splits
    "tasks": (
        "Tell me about the craft, the food, the ruler and the animal of Marast.",
        "Tell me about the river, the food and the ruler of Brivok.",
        "Tell me about the craft, the festival, the ruler and the river of Zanum.",
        "Take the word cloak and write down its initial, kind, length, plural and ending.",
        "Take the word potato and write down its kind, length and initial.",
        "About Elsa Quinn we know: room kitchen, city Athens, food plum, tool bell, pet wolf, job singer. Describe the tool, "
        "food and pet.",
        "About Simon Foster we know: city Athens, pet deer, room barn, job gardener, food radish, tool hammer. Describe the "
        "city, pet, job and room.",
        "The singer finds five onions, then five and later four. How many are there? Count from the end, the start and the "
        "outer.",
        "Suppose the lawyer has four apples and six lemons; the painter has three apples and five lemons; the hunter has "
        "three apples and four lemons. How many does each have, and who has the most?",
        "Choose one colour for the Vikings and describe their boots, drums, boat and shirts.",
        "Choose one colour for the Saints and describe their drums, tent and flag.",
        "Write a story about the teacher from the mountain, the lost saw and the mouse.",
    ),
    "recipes": (
        "What is the recipe for Cabbage Omelette?",
        "What is the recipe for Fluffy Protein Steamed Omelette?",
        "What is the recipe for Banana Cherry Smoothie?",
        "What is the recipe for Pear Honey Oatmeal?",
        "Give me a recipe for Smashed Potatoes with Feta.",
        "What is the recipe for Potato Pancakes with Meat?",
        "What is the recipe for Vegetable Couscous with Peas?",
        "Give me a recipe for Cabbage Soup with Meat.",
        "How do I make Mexican Chicken Burrito Bowl?",
        "How do I make Olivier Salad?",
        "Give me a recipe for Spinach and Orange Salad.",
        "How do I make Bananas Stuffed with Nuts in Chocolate?",
    ),
}  # of other data the three that the checkpoint names
LESSONS = {  # each sets up one prompt and up to three answers: model, way to decode, settings
    "topics": {
        "title": "Why topics?",
        "say": "Both answers have four spans of the same lengths. In the second the plan only numbers them, so no span knows "
        "which part to write. (The model never saw numbers as topics, which makes it worse.)",
        "prompt": PROMPTS["tasks"][0],
        "runs": [("tasks/planned", "planned", {"threshold": 0.9}),
                 ("tasks/planned", "planned", {"threshold": 0.9, "plan": "topic 1 4; topic 2 3; topic 3 4; topic 4 3"})],
    },
    "independent": {
        "title": "Why must spans be independent?",
        "say": "All four things should get one colour, and chance picks it. planned: spans do not see each other, so each "
        "picks its own. dense: spans see each other, and with a threshold an unsure colour waits until another span has "
        "one; but then all must be computed until the last is finished. named: blind spans again, but the plan has named "
        "the colour. So a plan has to cut an answer into parts that need nothing of each other, or say what they share. Click a "
        "colour to see its odds.",
        "prompt": "Choose one colour for the bridge, the coats, the tiles and the flag of Brivok.",
        "runs": [(f"towns/{name}", way, {"temperature": 1.0, "threshold": 0.9})
                 for name, way in (("planned", "planned"), ("dense", "dense"), ("named", "planned"))],
    },
    "steps": {
        "title": "What do few steps cost?",
        "say": "The first answer fills its spans in a fifth of the passes of the second. Words that are filled in the same pass "
        "do not know of each other: look for doubled, missing and broken ones.",
        "prompt": PROMPTS["recipes"][0],
        "runs": [("recipes/joint", "planned", {"steps_ratio": 0.1}), ("recipes/joint", "planned", {"steps_ratio": 0.5})],
    },
}  # fmt: skip
