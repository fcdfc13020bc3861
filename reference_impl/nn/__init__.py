"""The components that model families share: norm, rotary, masks, attention, feed_forward, kv_cache.

Models call the functions of these modules through the module (`rotary.rotate(...)`): each has one place to be replaced.
"""
