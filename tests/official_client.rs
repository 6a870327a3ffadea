//! The official Python client and the stand-in understand each other: it ingests, the rows land, nothing is a violation.
//!
//! The queue messages that it posts are the measure for weir's own.

#[path = "support/standin.rs"]
mod support;

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use support::{Bench, DATABASE, row};
use weir::standin::{StandinOptions, Target};

/// Longer than what some clients cut off.
const SAS_SIZE: usize = 300;

/// Runs the client; gives its output, and the stand-in that it talked to.
fn ingest(rows: &[String]) -> (Value, Bench) {
    let python = std::env::var("WEIR_TEST_PYTHON")
        .expect("WEIR_TEST_PYTHON is what tests/python/venv.sh prints");
    let bench = Bench::start(StandinOptions {
        account_count: 3,
        sas_size: SAS_SIZE,
        ..StandinOptions::default()
    });
    let options = bench.standin.options();
    let config = json!({
        "uri": bench.standin.ingest_uri(),
        "authority": bench.standin.token_authority(),
        "tenant": options.tenant,
        "client_id": options.client_id,
        "client_secret": options.client_secret,
        "database": DATABASE,
        "rows": rows,
    });
    let mut client = Command::new(python)
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/python/ingest.py"
        ))
        .env("NO_PROXY", "127.0.0.1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    client
        .stdin
        .take()
        .unwrap()
        .write_all(config.to_string().as_bytes())
        .unwrap();
    let output = client.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "the client failed; its words are above"
    );
    bench.settle();
    (serde_json::from_slice(&output.stdout).unwrap(), bench)
}

#[test]
#[ignore = "needs Python packages: set WEIR_TEST_PYTHON to what tests/python/venv.sh DIRECTORY prints"]
fn the_official_client_ingests() {
    let rows: Vec<String> = (0..1000)
        .map(|number| row(number).trim().to_owned())
        .collect();
    let (sources, bench) = ingest(&rows);
    let standin = &bench.standin;
    assert_eq!(standin.violations(), Vec::<String>::new());
    assert_eq!(bench.failure_codes(), Vec::<String>::new());
    assert_eq!(standin.rows(DATABASE, "Events"), rows);
    let records = rows.iter().map(|row| format!("{{\"record\":{row}}}"));
    assert_eq!(
        standin.rows(DATABASE, "Records"),
        records.collect::<Vec<_>>()
    );

    let raw_size: usize = rows.iter().map(|row| row.len() + 1).sum();
    let messages = standin.messages();
    let message = |table: &str| -> Value {
        let mut messages = messages
            .iter()
            .map(|json| serde_json::from_str::<Value>(json).unwrap());
        let message = messages
            .find(|message| message["TableName"] == table)
            .unwrap();
        println!("{message:#}");
        assert_eq!(message["Id"], sources[table]);
        assert_eq!(message["RetainBlobOnSuccess"], true);
        assert_eq!(message["AdditionalProperties"]["format"], "json");
        let sas = message["BlobPath"]
            .as_str()
            .unwrap()
            .split('?')
            .nth(1)
            .unwrap();
        assert!(sas.len() >= SAS_SIZE);
        message
    };
    // It does not know the size of a stream.
    assert_eq!(message("Events")["RawDataSize"], Value::Null);
    let records = message("Records");
    assert_eq!(records["RawDataSize"], raw_size);
    assert_eq!(
        records["AdditionalProperties"]["tags"],
        "[\"ingest-by:rows\"]"
    );
    assert_eq!(
        records["AdditionalProperties"]["ingestionMappingType"],
        "Json"
    );
    let puts = standin
        .requests()
        .into_iter()
        .filter(|seen| seen.target == Target::BlobPut);
    let puts: Vec<_> = puts
        .map(|seen| (seen.status, seen.path.ends_with(".gz")))
        .collect();
    assert_eq!(puts, [(201, true), (201, true)]);
}
