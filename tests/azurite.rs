//! Against Azurite: the signatures that the stand-in makes hold there, its engine reads queue and blobs from it, and weir
//! delivers through it.

#[path = "support/mod.rs"]
mod node;
#[path = "support/standin.rs"]
mod support;

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use node::{Weir, free_address};
use support::{Bench, DATABASE, TABLE, blob_uri, gzip, row, weir_config};
use weir::standin::{ExternalStorage, StandinOptions};

/// Azurite's account, and its published key.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// A running Azurite, in memory.
struct Azurite {
    process: Child,
    blob: SocketAddr,
    queue: SocketAddr,
}

impl Azurite {
    fn start() -> Azurite {
        let program = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/azurite/node_modules/.bin/azurite"
        );
        // It cannot be told to choose ports and say which. All three are held at once, so that they differ.
        let held = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [blob, queue, table] = held.map(|listener| listener.local_addr().unwrap());
        let mut process = Command::new(program)
            .args(["--inMemoryPersistence", "--disableTelemetry"])
            .args(["--blobPort", &blob.port().to_string()])
            .args(["--queuePort", &queue.port().to_string()])
            .args(["--tablePort", &table.port().to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}; run npm ci in tests/azurite"));
        let stdout = BufReader::new(process.stdout.take().unwrap());
        let azurite = Azurite {
            process,
            blob,
            queue,
        };
        let (ready, wait) = mpsc::channel();
        // To its end, since it logs each request and must not block on a full pipe.
        std::thread::spawn(move || {
            let lines = stdout.lines().map_while(Result::ok);
            for _ in lines.filter(|line| line.contains("successfully listening")) {
                // Nobody waits for more than three.
                let _ = ready.send(());
            }
        });
        for _ in 0..3 {
            wait.recv_timeout(support::PATIENCE)
                .expect("Azurite does not listen");
        }
        azurite
    }

    fn storage(&self) -> ExternalStorage {
        ExternalStorage {
            blob_address: self.blob,
            queue_address: self.queue,
            account: ACCOUNT.into(),
            key: KEY.into(),
            containers: vec!["ingestdata-0".into(), "ingestdata-1".into()],
            queues: vec!["readyforaggregation-secured".into()],
        }
    }
}

impl Drop for Azurite {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[test]
#[ignore = "needs Node packages: npm ci --prefix tests/azurite"]
fn blobs_and_messages_go_through_azurite() {
    let azurite = Azurite::start();
    let bench = Bench::start(StandinOptions {
        external: Some(azurite.storage()),
        sas_size: 300,
        ..StandinOptions::default()
    });
    let standin = &bench.standin;
    assert_eq!(bench.resources("TempStorage").len(), 2);
    assert!(
        bench
            .container()
            .starts_with(&format!("http://{}/{ACCOUNT}/ingestdata-0?", azurite.blob))
    );
    let text: String = (0..100).map(row).collect();
    let uri = blob_uri(&bench.container(), "x.json.gz");
    let put = || {
        let request = bench
            .put(&uri, gzip(text.as_bytes()))
            .header("If-None-Match", "*");
        bench.send(request).unwrap()
    };
    assert_eq!(put().status, 201);
    assert_eq!(put().error(), (409, "BlobAlreadyExists"));
    assert_eq!(
        bench
            .send(bench.put(&uri.replace("sp=rwd", "sp=rwdl"), "x"))
            .unwrap()
            .status,
        403
    );
    bench.enqueue(&bench.message(&uri, text.len()));
    assert!(standin.wait_for(
        support::PATIENCE,
        |standin| standin.row_count(DATABASE, TABLE) == 100
    ));
    // The engine reads blobs with the signature of the message, not with its own.
    bench.enqueue(&bench.message(&uri.replace("sig=", "sig=A"), text.len()));
    assert!(standin.wait_for(support::PATIENCE, |standin| standin.failures().len() == 1));
    assert_eq!(bench.failure_codes(), ["Download_Forbidden"]);
    assert_eq!(standin.rows(DATABASE, TABLE)[99], row(99).trim());
    assert_eq!(standin.violations(), Vec::<String>::new());
}

#[test]
#[ignore = "needs Node packages: npm ci --prefix tests/azurite"]
fn weir_delivers_through_azurite() {
    let azurite = Azurite::start();
    let bench = Bench::start(StandinOptions {
        external: Some(azurite.storage()),
        ..StandinOptions::default()
    });
    let standin = &bench.standin;
    let directory = tempfile::tempdir().unwrap();
    let admin = free_address();
    let config = weir_config(standin, directory.path(), admin, "");
    let weir = Weir::start_logging(directory, &config, admin, "info");
    let mut client = weir.connect();
    for number in 0..100 {
        let reply = client.post("/x", format!("{{\"n\":{number}}}").as_bytes());
        assert_eq!(reply.status, 201, "{reply:?}");
    }
    weir.wait_for_metric("weir_delivered_rows_total 100");
    assert!(
        standin.wait_for(support::PATIENCE, |standin| {
            standin.row_count(DATABASE, TABLE) == 100
        }),
        "{:?}",
        standin.failures()
    );
    // A weir that comes after a kill goes on where the first was.
    let weir = Weir::start_logging(weir.kill(), &config, admin, "info");
    assert_eq!(weir.connect().post("/x", b"{\"n\":100}").status, 201);
    weir.wait_for_metric("weir_delivered_rows_total 1");
    assert!(standin.wait_for(support::PATIENCE, |standin| {
        standin.row_count(DATABASE, TABLE) == 101
    }));
    assert_eq!(weir.metric("weir_delivery_failures_total"), 0);
    assert_eq!(standin.violations(), Vec::<String>::new());
    let rows = standin.rows(DATABASE, TABLE);
    assert!(
        rows[0].ends_with("\"tag\":\"x\",\"log\":{\"n\":0}}"),
        "{}",
        rows[0]
    );
}
