"""Does the distance between weights foretell how well they merge?"""
