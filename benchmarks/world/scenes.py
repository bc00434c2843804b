"""The world's drawings: shape x colour x texture x background x position, and their captions.

A scene is drawn from signed distances (negative inside; Quilez's formulae for
polygons), supersampled, so any image size gives the same picture.  ``STYLES`` are
ways to draw the same scene that pretraining never shows, ``CHARACTERS`` shapes that
it never shows: they are there to be taught by an adapter.
"""

from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (0.90, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.90, 0.10),
    "green": (0.10, 0.65, 0.20),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.12, 0.25, 0.90),
    "purple": (0.55, 0.15, 0.75),
    "pink": (1.00, 0.55, 0.75),
}
TEXTURES = ("solid", "striped", "dotted", "checked")
#: Name -> colour at the top and at the bottom of the picture.
BACKGROUNDS = {
    "white": ((0.97, 0.97, 0.97),) * 2,
    "black": ((0.04, 0.04, 0.04),) * 2,
    "grey": ((0.50, 0.50, 0.50),) * 2,
    "red": (COLOURS["red"],) * 2,
    "yellow": (COLOURS["yellow"],) * 2,
    "green": (COLOURS["green"],) * 2,
    "blue": (COLOURS["blue"],) * 2,
    "pink": (COLOURS["pink"],) * 2,
    "sunset": ((0.35, 0.10, 0.50), (1.00, 0.65, 0.20)),
    "sky": ((0.20, 0.50, 0.95), (0.95, 0.98, 1.00)),
}
#: Name -> centre of the shape, in picture widths from the top left corner.
POSITIONS = {
    "centre": (0.50, 0.50),
    "top left": (0.30, 0.30),
    "top right": (0.70, 0.30),
    "bottom left": (0.30, 0.70),
    "bottom right": (0.70, 0.70),
}
RADIUS = 0.26
#: Half-width of the jitter of centre and radius, in picture widths.
JITTER = 0.02
SUPERSAMPLE = 3

STYLES = ("neon", "stamp", "blueprint")
#: Shapes that no random scene has, for an adapter to learn by their name: to the tokenizer a rare word.
CHARACTERS = ("crescent",)
#: Every word a caption can hold; fixes the tokenizer's rows, so its order must not change.
CAPTION_WORDS = (
    "a",
    "an",
    "on",
    "background",
    *SHAPES,
    *COLOURS,
    *TEXTURES,
    *[b for b in BACKGROUNDS if b not in COLOURS],
    "centre",
    "top",
    "bottom",
    "left",
    "right",
    "in",
    "style",
)


@dataclass(frozen=True)
class Scene:
    """One scene by name, plus its jitter: dx, dy, dr in picture widths (each 0 = exact)."""

    shape: str
    colour: str
    texture: str
    background: str
    position: str
    dx: float = 0.0
    dy: float = 0.0
    dr: float = 0.0

    def __post_init__(self):
        choices = {
            "shape": (*SHAPES, *CHARACTERS),
            "colour": COLOURS,
            "texture": TEXTURES,
            "background": BACKGROUNDS,
            "position": POSITIONS,
        }
        for field, names in choices.items():
            value = getattr(self, field)
            if value not in names:
                raise ValueError(f"scene {field} {value!r}: must be one of {', '.join(names)}")
        if self.colour == self.background:
            raise ValueError(
                f"scene background {self.background!r}: equals the colour, so the "
                "shape would be invisible; choose another"
            )


def random_scene(rng):
    """A uniform scene with jitter, its background unlike its colour.  rng: numpy Generator."""
    colour = rng.choice(list(COLOURS))
    backgrounds = [b for b in BACKGROUNDS if b != colour]
    dx, dy, dr = rng.uniform(-JITTER, JITTER, 3)
    return Scene(
        str(rng.choice(SHAPES)),
        str(colour),
        str(rng.choice(TEXTURES)),
        str(rng.choice(backgrounds)),
        str(rng.choice(list(POSITIONS))),
        float(dx),
        float(dy),
        float(dr),
    )


def caption(scene, style=None, position=True):
    """E.g. "a striped red circle on a green background, top left, in neon style".

    "solid" is not said.  position=False leaves the position out.  style is any word,
    such as a trigger; it comes last, where it does not displace the other words.
    """
    texture = "" if scene.texture == "solid" else scene.texture + " "
    thing = f"{texture}{scene.colour} {scene.shape}"
    text = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing} on a {scene.background} background"
    if position:
        text += f", {scene.position}"
    if style is not None:
        text += f", in {style} style"
    return text


def _polygon_distance(x, y, points):
    """Signed distance to a polygon, negative inside.  points: (N, 2), x, y: equal shapes."""
    distance = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, np.hypot(px - along * ex, py - along * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    return np.where(inside, -distance, distance)


def _star_points(tips, inner):
    angle = np.arange(2 * tips) * np.pi / tips - np.pi / 2
    radius = np.where(np.arange(2 * tips) % 2, inner, 1.0)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _box_distance(x, y, half_x, half_y):
    qx, qy = np.abs(x) - half_x, np.abs(y) - half_y
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0)


def shape_distance(shape, x, y):
    """Signed distance, negative inside, in units of the shape's radius.  y points down."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius - 1
    if shape == "ring":
        return np.abs(radius - 0.75) - 0.27
    if shape == "square":
        return _box_distance(x, y, 0.85, 0.85)
    if shape == "cross":
        return np.minimum(_box_distance(x, y, 1.0, 0.34), _box_distance(x, y, 0.34, 1.0))
    if shape == "crescent":
        return np.maximum(radius - 1, 0.75 - np.hypot(x - 0.45, y + 0.2))
    if shape == "triangle":
        return _polygon_distance(x, y, np.array([(0, -1.0), (1.05, 0.85), (-1.05, 0.85)]))
    return _polygon_distance(x, y, 1.15 * _star_points(5, 0.45))


def _texture_mask(texture, x, y):
    """True where the darker second colour shows.  x, y in units of the shape's radius."""
    if texture == "striped":
        return np.mod(y + 0.25, 0.5) < 0.25
    if texture == "dotted":
        return np.hypot(np.mod(x + 0.3, 0.6) - 0.3, np.mod(y + 0.3, 0.6) - 0.3) < 0.16
    if texture == "checked":
        return (np.floor(x / 0.45) + np.floor(y / 0.45)) % 2 == 0
    return np.zeros(x.shape, dtype=bool)


def _mix(a, b, amount):
    """a where amount is 0, b where 1.  a, b: colours or (H, W, 3); amount: (H, W)."""
    amount = np.asarray(amount, dtype=float)[..., None]
    return np.asarray(a) * (1 - amount) + np.asarray(b) * amount


def _paint(scene, style, u, v):
    """(H, W, 3) colours at picture coordinates u (right), v (down) in 0..1."""
    centre_x, centre_y = POSITIONS[scene.position]
    radius = RADIUS + scene.dr
    x, y = (u - centre_x - scene.dx) / radius, (v - centre_y - scene.dy) / radius
    distance = shape_distance(scene.shape, x, y)
    inside, second = distance < 0, _texture_mask(scene.texture, x, y)
    colour = np.array(COLOURS[scene.colour])
    top, bottom = BACKGROUNDS[scene.background]
    background = _mix(top, bottom, v)

    if style == "neon":
        # A hint of the background stays in the dark, so the caption's words all still matter.
        glow = np.clip(np.exp(-np.abs(distance) / 0.22), 0, 1)
        tube = np.abs(distance) < 0.12
        picture = _mix(0.03 + 0.12 * background, 0.15 + 0.85 * colour, 0.9 * glow)
        return _mix(picture, 0.35 + 0.65 * colour, tube)
    if style == "stamp":
        paper, ink = np.array((0.95, 0.89, 0.74)), 0.55 * colour
        border = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v))
        frame = (border > 0.03) & (border < 0.12)
        inked = (inside & ~second) | ((distance < 0) & (distance > -0.16))
        return _mix(paper, ink, inked | frame)
    if style == "blueprint":
        grid = (np.mod(u, 0.125) < 0.03) | (np.mod(v, 0.125) < 0.03)
        line = np.abs(distance) < 0.12
        return _mix(_mix((0.05, 0.20, 0.55), (0.25, 0.42, 0.75), grid), (0.95, 0.97, 1.0), line)
    return _mix(background, _mix(colour, 0.4 * colour, second), inside)


def draw(scene, style=None, image_size=32):
    """The picture of a scene: (image_size, image_size, 3) uint8 RGB, deterministic.

    style: None for the world's own, or one of STYLES, none of which is in the
    pretraining data: "neon" (glowing outline in the dark), "stamp" (dark ink on
    cream paper in a thick frame) and "blueprint" (white outline on a blue grid).
    Raises ValueError otherwise.
    """
    if style is not None and style not in STYLES:
        raise ValueError(f"style {style!r}: must be None or one of {', '.join(STYLES)}")
    if image_size < 8:
        raise ValueError(f"image_size {image_size}: must be at least 8; 32 is the world's size")
    side = image_size * SUPERSAMPLE
    ticks = (np.arange(side) + 0.5) / side
    picture = _paint(scene, style, *np.meshgrid(ticks, ticks))
    picture = picture.reshape(image_size, SUPERSAMPLE, image_size, SUPERSAMPLE, 3).mean(axis=(1, 3))
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def draw_set(count, seed, style=None, image_size=32):
    """A captioned set: list of (uint8 picture, Scene), e.g. the images that teach a style."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    return [(draw(scene, style, image_size), scene) for scene in scenes]
