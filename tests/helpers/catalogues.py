"""Translation catalogues as programs come with them."""

from pathlib import Path

from ml_embed.sample_data.messages import LANGUAGES


def write_catalogues(folder: Path, messages: int) -> None:
    """<folder>/<language>/LC_MESSAGES/made.mo, with so many messages in every language.

    One message more is in none but German, one has a placeholder, one has no translation.
    """
    import polib

    for language in LANGUAGES:
        catalogue = polib.MOFile()
        texts = {
            spelled(number): f"{language} {spelled(number, 'gdlprsvz')}"
            for number in range(messages)
        }
        texts |= {"Open the file %s": f"{language} something", "Without a translation": ""}
        if language == "de":
            texts["Only in German"] = "Nur hier"
        for source, text in texts.items():
            catalogue.append(polib.POEntry(msgid=source, msgstr=text))
        place = folder / language / "LC_MESSAGES"
        place.mkdir(parents=True)
        catalogue.save(str(place / "made.mo"))


def spelled(number: int, letters: str = "aeioubkm") -> str:
    """A number as eight letters."""
    return "".join(letters[number >> 3 * place & 7] for place in range(8))
