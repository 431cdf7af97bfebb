"""Writes one table of rewarded completions by a tool, in every way that it has: `frames.py TOOL FOLDER`.

It imports the tool and the standard library alone, for an environment without this project.
"""

import contextlib
import sys
from pathlib import Path

ROWS = [
    {"prompt": f"p{i}", "completions": [f"a{i}", f"b{i}"], "rewards": [1.0, 0.5], "source": "web" if i % 2 else "book"}
    for i in range(4)
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completions": [[{"role": "assistant", "content": text}] for text in row["completions"]],
        "rewards": row["rewards"],
        "source": row["source"],
    }
    for row in ROWS
]


def polars(rows: list[dict], folder: Path) -> None:
    import polars as pl

    frame = pl.DataFrame(rows)
    decimals = pl.col("rewards").cast(pl.List(pl.Decimal(10, 2)))
    arrays = pl.col("rewards").cast(pl.Array(pl.Float32, 2))
    frames = {
        "plain": frame, "decimal": frame.with_columns(decimals), "array": frame.with_columns(arrays),
        "categories": frame.with_columns(pl.col("source").cast(pl.Categorical)),
    }  # fmt: skip
    for name, own in frames.items():
        own.write_parquet(folder / f"{name}.parquet")
        own.write_ipc(folder / f"{name}.arrow")
        own.write_ipc(folder / f"{name}-zstd.arrow", compression="zstd")
        own.write_ipc(folder / f"{name}-oldest.arrow", compat_level=pl.CompatLevel.oldest())
        own.write_ipc_stream(folder / f"{name}-stream.arrow")
    frame.write_ndjson(folder / "plain.ndjson")
    frame.write_json(folder / "plain.json")
    frame.write_parquet(folder / "parts", partition_by="source")


def pandas(rows: list[dict], folder: Path) -> None:
    from decimal import Decimal

    import pandas as pd

    frame = pd.DataFrame(rows)
    decimals = [[Decimal(str(value)) for value in row["rewards"]] for row in rows]
    frames = {
        "plain": frame,
        "decimal": frame.assign(rewards=decimals),
        "category": frame.astype({"source": "category"}),
    }
    for name, own in frames.items():
        own.to_parquet(folder / f"{name}.parquet")
        own.to_feather(folder / f"{name}.feather")
    frame.set_index(pd.Index([5, 3, 2, 9])).to_parquet(folder / "index.parquet")
    frame.to_parquet(folder / "parts", partition_cols=["source"])
    frame.to_json(folder / "lines.jsonl", orient="records", lines=True)
    frame.to_json(folder / "records.json", orient="records")
    with contextlib.suppress(ImportError):
        frame.to_parquet(folder / "fast.parquet", engine="fastparquet")


def duckdb(rows: list[dict], folder: Path) -> None:
    import json

    import duckdb as db

    (folder / "rows.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = f"read_json('{folder / 'rows.txt'}', format='newline_delimited')"
    ways = {"plain": "*", "decimal": "* REPLACE (rewards::DECIMAL(10,2)[] AS rewards)",
            "more": "*, MAP{'a': 1} AS map, uuid() AS uuid, 5::HUGEINT AS huge, source::ENUM('web', 'book') AS enum",
            "array": "* REPLACE (rewards::FLOAT[2] AS rewards)"}  # fmt: skip
    if isinstance(rows[0]["prompt"], list):
        ways["maps"] = "* REPLACE ([MAP{'role': 'user', 'content': prompt[1].content}] AS prompt)"
    for name, columns in ways.items():
        for options in ("FORMAT PARQUET", "FORMAT JSON", "FORMAT JSON, ARRAY true"):
            end = "parquet" if "PARQUET" in options else "json"
            file = folder / f"{name}{'-array' if 'ARRAY' in options else ''}.{end}"
            db.sql(f"COPY (SELECT {columns} FROM {table}) TO '{file}' ({options})")
    db.sql(f"COPY (SELECT * FROM {table}) TO '{folder / 'parts'}' (FORMAT PARQUET, PARTITION_BY (source))")
    (folder / "rows.txt").unlink()


def spark(rows: list[dict], folder: Path) -> None:
    from pyspark.sql import SparkSession
    from pyspark.sql import functions as F

    session = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    texts = "prompt string, completions array<string>, rewards array<double>, source string"
    message = "struct<role:string,content:string>"
    chats = f"prompt array<{message}>, completions array<array<{message}>>, rewards array<double>, source string"
    frame = session.createDataFrame(rows, chats if isinstance(rows[0]["prompt"], list) else texts).repartition(2)
    decimals = F.expr("transform(rewards, x -> cast(x as decimal(10,2)))")
    frames = {"plain": frame, "decimal": frame.withColumn("rewards", decimals),
              "map": frame.withColumn("beside", F.expr("map('a', 1)"))}  # fmt: skip
    for name, own in frames.items():
        for codec in ("snappy", "zstd", "none"):
            own.write.option("compression", codec).parquet(str(folder / f"{name}-{codec}"))
        own.write.json(str(folder / f"{name}-json"))
        own.write.option("compression", "gzip").json(str(folder / f"{name}-gzip"))
    frame.write.partitionBy("source").parquet(str(folder / "parts"))
    session.stop()


if __name__ == "__main__":
    for kind, rows in (("texts", ROWS), ("chats", CHATS)):
        folder = Path(sys.argv[2]) / kind
        folder.mkdir(parents=True)
        globals()[sys.argv[1]](rows, folder)
