"""Ingests rows with the official Kusto client.

Standard input is one JSON object: uri, authority, tenant, client_id, client_secret, database, rows (JSON texts).
The rows go to the table Events as a stream, without a mapping, and to Records as a file, with one and with tags.
Standard output is one JSON object: the source ids, by table.
"""

import io
import json
import os
import sys
import tempfile

import requests
from azure.kusto.data import KustoConnectionStringBuilder
from azure.kusto.data.data_format import DataFormat, IngestionMappingKind
from azure.kusto.ingest import IngestionProperties, QueuedIngestClient, ReportLevel

config = json.load(sys.stdin)


def token() -> str:
    # MSAL wants the authority to be https, so the token is fetched by hand.
    answer = requests.post(
        f"{config['authority']}/{config['tenant']}/oauth2/v2.0/token",
        data={
            "grant_type": "client_credentials",
            "client_id": config["client_id"],
            "client_secret": config["client_secret"],
            "scope": "https://kusto.kusto.windows.net/.default",
        },
        timeout=60,
    )
    answer.raise_for_status()
    return answer.json()["access_token"]


connection = KustoConnectionStringBuilder.with_token_provider(config["uri"], token)
text = "".join(row + "\n" for row in config["rows"]).encode()

with QueuedIngestClient(connection) as client:
    events = client.ingest_from_stream(
        io.BytesIO(text),
        IngestionProperties(
            config["database"], "Events", data_format=DataFormat.JSON, report_level=ReportLevel.FailuresAndSuccesses
        ),
    )
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "rows.json")
        with open(path, "wb") as file:
            file.write(text)
        records = client.ingest_from_file(
            path,
            IngestionProperties(
                config["database"],
                "Records",
                data_format=DataFormat.JSON,
                ingestion_mapping_kind=IngestionMappingKind.JSON,
                ingestion_mapping_reference="record_v1",
                ingest_by_tags=["rows"],
                ingest_if_not_exists=["rows"],
            ),
        )

print(json.dumps({"Events": str(events.source_id), "Records": str(records.source_id)}))
