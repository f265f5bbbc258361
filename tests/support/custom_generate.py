"""Generate functions as users write them."""

from dataclasses import replace


async def shorter_of_two(draw, prompt, sampling, seed):
    drawn = [await draw(prompt, sampling, seed + i) for i in range(2)]
    return min(drawn, key=lambda completion: len(completion.token_ids))


async def raises(draw, prompt, sampling, seed):
    return {}["no key"]


async def forgets(draw, prompt, sampling, seed):
    completion = await draw(prompt, sampling, seed)
    return replace(completion, token_ids=[*completion.token_ids, 5])


async def nothing(draw, prompt, sampling, seed):
    return None


def no_coroutine(draw, prompt, sampling, seed):
    return None
