"""Auto-refill: buy a pack with the tenant's saved card when its balance falls below a threshold.

``refill`` holds the values and rules, ``store`` keeps them, ``refiller`` is the periodic task that charges.
"""
