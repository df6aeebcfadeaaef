"""From what is written into the prompt box to the prompts that are painted: pure functions, no torch.

`lines` splits the box into prompts and fills in macros, `choices` draws `{a|b}` and `__wildcards__`, which
`wildcards` reads, and `jobs` puts them together: one set of settings in, one for every job out.
"""
