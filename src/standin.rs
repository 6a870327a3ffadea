//! A stand-in for Azure Data Explorer's queued ingestion, on loopback: for `weir demo`, for tests, for measurements.
//!
//! In one process it plays the token endpoints, Kusto's management commands, storage accounts with blobs and queues, and the
//! engine that takes queue messages and ingests blobs.
//! Before it: a client is given [`Standin::ingest_uri`]. After it: rows, failures, violations, and a log of requests.
//! Thread: tasks of the runtime it is started on; the handle is for any thread. Allocates: freely, within configured bounds.
//! Invariant: it is as strict as the service is documented to be, and tells where a client relies on leniency.
//! Not here: TLS, queries, streaming ingestion, the REST ingestion API, status tables.
//! Where the service is undocumented the file that plays it says so.
//!
//! A request's way: `listener` → `front` (noted, struck by a `fault`) → `identity`, `mgmt` or `storage` → `engine` → `catalog`.

mod catalog;
mod clock;
mod engine;
mod external;
mod fault;
mod front;
mod identity;
mod journal;
mod listener;
mod message;
mod mgmt;
mod pages;
mod row;
mod sas;
mod storage;

pub use catalog::{TableCounts, TableOptions};
pub use engine::harvest::{Members, RowCheck};
pub use engine::{Batching, Failure};
pub use external::ExternalStorage;
pub use fault::{Action, Fault, Target};
pub use journal::SeenRequest;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use tokio::runtime::Handle;

use front::{Front, Port};
use listener::Listener;
use storage::{Addresses, StorageOptions};

/// What a stand-in is like. The default is a small one, strict, with all that the client secret below may do.
#[derive(Debug, Clone)]
pub struct StandinOptions {
    /// The one address to know; port 0 lets the kernel choose. Storage has ports of its own on the same IP address.
    pub listen: SocketAddr,
    pub tenant: String,
    pub client_id: String,
    pub client_secret: String,
    /// A client assertion that is taken as it is: a workload identity's federated token.
    pub federated_token: Option<String>,
    pub token_lifetime: Duration,
    /// Not published by Azure.
    pub identity_token_lifetime: Duration,
    /// What the application may do: `Ingestor`, `Viewer`, `User`, `Monitor`, `Admin`.
    pub roles: Vec<String>,
    pub account_count: usize,
    /// Containers per account.
    pub container_count: usize,
    /// Ingestion queues per account.
    pub queue_count: usize,
    /// Bytes that every SAS has at least.
    pub sas_size: usize,
    pub sas_lifetime: Duration,
    pub tables: Vec<TableOptions>,
    /// Rows kept per table, and bytes of their records; the oldest go first.
    /// Keeping is copying: where speed is measured, keep a mebibyte, and check with [`RowCheck::OneIn`].
    pub rows_count_max: usize,
    pub rows_size_max: usize,
    /// Bytes of blobs kept. Ingested ones go first; with none of those it answers 503.
    pub blobs_size_max: usize,
    pub batching: Batching,
    pub members: Members,
    pub row_check: RowCheck,
    /// Hand this storage out instead of the stand-in's own.
    pub external: Option<ExternalStorage>,
}

impl Default for StandinOptions {
    fn default() -> StandinOptions {
        StandinOptions {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            tenant: "72f988bf-0000-4000-8000-2d7cd011db47".into(),
            client_id: "11111111-2222-4333-8444-555555555555".into(),
            client_secret: "standin~Secret+1/2=".into(),
            federated_token: None,
            token_lifetime: Duration::from_secs(3599),
            identity_token_lifetime: Duration::from_secs(12 * 3600),
            roles: vec!["Ingestor".into(), "Viewer".into()],
            account_count: 2,
            container_count: 2,
            queue_count: 2,
            sas_size: 0,
            sas_lifetime: Duration::from_secs(24 * 3600),
            tables: vec![
                TableOptions::fluent_bit("Telemetry", "Events"),
                TableOptions::record("Telemetry", "Records"),
            ],
            rows_count_max: 10_000,
            rows_size_max: 64 << 20,
            blobs_size_max: 256 << 20,
            batching: Batching::Immediate,
            members: Members::All,
            row_check: RowCheck::Every,
            external: None,
        }
    }
}

/// A running stand-in. Dropping it closes its ports.
pub struct Standin {
    service: Arc<Service>,
    control: Listener,
    accounts: Vec<[Listener; 2]>,
    engine: tokio::task::AbortHandle,
}

/// Everything that the parts share.
struct Service {
    options: StandinOptions,
    address: SocketAddr,
    clock: clock::Clock,
    journal: journal::Journal,
    script: fault::Script,
    tokens: identity::Tokens,
    identity_tokens: identity::Tokens,
    roles: Mutex<Vec<String>>,
    storage: storage::Storage,
    external: Option<external::External>,
    catalog: catalog::Catalog,
    engine: engine::Engine,
    progress: Progress,
}

impl Service {
    fn uri(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Whether every message that was posted has come to its end.
    fn is_settled(&self) -> bool {
        // In the order of the flow, so that nothing is missed between the two.
        self.storage.queues.message_count() == 0 && self.engine.is_idle()
    }
}

/// Wakes who waits for something to happen.
#[derive(Default)]
struct Progress {
    changes: Mutex<u64>,
    changed: Condvar,
}

impl Progress {
    fn changed(&self) {
        *self.changes.lock().unwrap() += 1;
        self.changed.notify_all();
    }
}

impl Standin {
    /// Starts on `runtime`, which has to have its I/O and time drivers, and at least one thread of its own.
    ///
    /// Call it outside of the runtime if there is external storage, which is made ready first.
    ///
    /// # Errors
    ///
    /// An address that is not on loopback or that cannot be bound, a table that cannot be, external storage that refuses.
    pub fn start(options: StandinOptions, runtime: &Handle) -> io::Result<Standin> {
        if !options.listen.ip().is_loopback() || !options.listen.is_ipv4() {
            return Err(io::Error::other("the stand-in listens on 127.0.0.0/8 only"));
        }
        let (control, address) = listener::bind(options.listen)?;
        let anywhere = SocketAddr::new(options.listen.ip(), 0);
        let mut sockets = Vec::new();
        let mut addresses = Vec::new();
        for _ in 0..options.account_count {
            let (blob, queue) = (listener::bind(anywhere)?, listener::bind(anywhere)?);
            addresses.push(Addresses {
                blob: blob.1,
                queue: queue.1,
            });
            sockets.push([blob, queue]);
        }
        let storage = StorageOptions {
            container_count: options.container_count,
            queue_count: options.queue_count,
            sas_size: options.sas_size,
            sas_lifetime: options.sas_lifetime,
            blobs_size_max: options.blobs_size_max,
        };
        let catalog = catalog::Catalog::new(options.rows_count_max, options.rows_size_max);
        for table in &options.tables {
            catalog.create_table(table).map_err(io::Error::other)?;
        }
        let clock = clock::Clock::default();
        let external = options.external.clone().map(|external| {
            external::External::new(
                external,
                options.sas_size,
                options.sas_lifetime,
                clock.now(),
            )
        });
        let external = external.transpose()?;
        if let Some(external) = &external {
            runtime.block_on(external.prepare())?;
        }
        let service = Arc::new(Service {
            address,
            clock,
            journal: journal::Journal::default(),
            script: fault::Script::default(),
            tokens: identity::Tokens::default(),
            identity_tokens: identity::Tokens::default(),
            roles: Mutex::new(options.roles.clone()),
            storage: storage::Storage::new(addresses, &storage),
            external,
            catalog,
            engine: engine::Engine::default(),
            progress: Progress::default(),
            options,
        });
        let listener = |(socket, address), router: Router, port| {
            let front = Front {
                service: service.clone(),
                port,
            };
            // Bodies have bounds of their own, which answer in the service's words.
            let router = router.layer(DefaultBodyLimit::disable());
            let router = router.layer(from_fn_with_state(front, front::pass));
            let listener = Listener::new(socket, address, router, runtime.clone());
            listener.open().map(|()| listener)
        };
        let control = listener((control, address), control_router(&service), Port::Control)?;
        let mut accounts = Vec::new();
        for (index, [blob, queue]) in sockets.into_iter().enumerate() {
            let place = storage::Place {
                service: service.clone(),
                account: index,
            };
            let blobs = listener(
                blob,
                storage::blob::router(place.clone()),
                Port::Blob(index),
            )?;
            let queues = listener(queue, storage::queue::router(place), Port::Queue(index))?;
            accounts.push([blobs, queues]);
        }
        let engine = runtime.spawn(engine::Engine::run(service.clone()));
        Ok(Standin {
            service,
            control,
            accounts,
            engine: engine.abort_handle(),
        })
    }

    /// The ingestion endpoint, and the engine: `http://127.0.0.1:PORT`.
    pub fn ingest_uri(&self) -> String {
        self.service.uri()
    }

    /// What stands for `https://login.microsoftonline.com`; IMDS is below it as well.
    pub fn token_authority(&self) -> String {
        self.service.uri()
    }

    pub fn options(&self) -> &StandinOptions {
        &self.service.options
    }

    // --- what landed ----------------------------------------------------------------------

    /// The rows kept of a table, oldest first, each a JSON object; none where there is no such table.
    pub fn rows(&self, database: &str, table: &str) -> Vec<String> {
        self.newest_rows(database, table, usize::MAX)
    }

    /// The newest `count` of them.
    pub fn newest_rows(&self, database: &str, table: &str, count: usize) -> Vec<String> {
        let rows = self.service.catalog.rows(database, table, count);
        rows.unwrap_or_default()
    }

    /// Rows that landed since the table was created, kept or not.
    pub fn row_count(&self, database: &str, table: &str) -> u64 {
        self.counts(database, table).rows
    }

    /// Totals of a table; zeros where there is no such table.
    pub fn counts(&self, database: &str, table: &str) -> TableCounts {
        self.service
            .catalog
            .counts(database, table)
            .unwrap_or_default()
    }

    /// Blobs that failed, oldest first; bounded.
    pub fn failures(&self) -> Vec<Failure> {
        self.service.engine.failures()
    }

    // --- what was seen --------------------------------------------------------------------

    /// What clients did wrong, oldest first; bounded.
    pub fn violations(&self) -> Vec<String> {
        self.service.journal.violations()
    }

    /// Requests, oldest first; bounded.
    pub fn requests(&self) -> Vec<SeenRequest> {
        self.service.journal.requests()
    }

    /// The JSON of ingestion messages that the engine took, oldest first; bounded.
    pub fn messages(&self) -> Vec<String> {
        self.service.journal.messages()
    }

    /// Every secret that was received or given: no log of a client may hold one of them.
    ///
    /// Client secrets, assertions, access tokens, identity tokens, and SAS signatures both plain and percent-encoded.
    pub fn secrets(&self) -> Vec<String> {
        self.service.journal.secrets()
    }

    /// Waits until `condition` holds, which is asked after every request and every step of the engine, and at the end.
    /// It blocks its thread, which therefore must not be one of the runtime's.
    pub fn wait_for(&self, timeout: Duration, mut condition: impl FnMut(&Standin) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let progress = &self.service.progress;
        loop {
            let seen = *progress.changes.lock().unwrap();
            if condition(self) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let changes = progress.changes.lock().unwrap();
            let waited = progress
                .changed
                .wait_timeout_while(changes, left, |changes| *changes == seen);
            if waited.expect("nobody panics while counting").1.timed_out() {
                return condition(self);
            }
        }
    }

    /// Waits until every message in the stand-in's own queues has come to its end; what is in an open batch has not.
    pub fn wait_settled(&self, timeout: Duration) -> bool {
        self.wait_for(timeout, |standin| standin.service.is_settled())
    }

    // --- what shall happen ----------------------------------------------------------------

    /// Adds a fault. Where several fit a request, the one added first strikes.
    pub fn script(&self, fault: Fault) {
        self.service.script.add(fault);
    }

    /// Removes all faults. A request that one has left without an answer stays so.
    pub fn clear_faults(&self) {
        self.service.script.clear();
    }

    /// Moves the stand-in's clock on: tokens and SAS expire, messages become visible, batches get old.
    pub fn advance(&self, by: Duration) {
        self.service.clock.advance(by);
        self.service.engine.wake();
    }

    /// From now on other containers and queues are handed out. The old ones go on, or answer writers with 404.
    pub fn rotate_resources(&self, keep_old: bool) {
        self.service.storage.rotate(keep_old);
    }

    /// Every SAS handed out so far has expired, also for the engine's reading.
    pub fn expire_sas(&self) {
        self.service.storage.withdraw();
    }

    /// Every access token has expired.
    pub fn expire_tokens(&self) {
        self.service.tokens.expire();
    }

    /// Every identity token has expired.
    pub fn expire_identity_tokens(&self) {
        self.service.identity_tokens.expire();
    }

    pub fn set_roles(&self, roles: &[&str]) {
        *self.service.roles.lock().unwrap() = roles.iter().map(ToString::to_string).collect();
    }

    /// Storage account `index` refuses connections, and loses those it has.
    pub fn kill_account(&self, index: usize) {
        self.accounts[index].iter().for_each(Listener::close);
    }

    /// # Errors
    ///
    /// Where the kernel does not let it listen again.
    pub fn revive_account(&self, index: usize) -> io::Result<()> {
        self.accounts[index].iter().try_for_each(Listener::open)
    }

    /// All of it refuses connections, and loses those it has. What was stored stays.
    pub fn stop_listening(&self) {
        self.control.close();
        (0..self.accounts.len()).for_each(|index| self.kill_account(index));
    }

    /// Comes back under the same ports.
    ///
    /// # Errors
    ///
    /// Where the kernel does not let it listen again.
    pub fn resume(&self) -> io::Result<()> {
        self.control.open()?;
        (0..self.accounts.len()).try_for_each(|index| self.revive_account(index))
    }

    /// The engine takes no more messages; storage goes on.
    pub fn pause_ingestion(&self) {
        self.service.engine.pause();
    }

    pub fn resume_ingestion(&self) {
        self.service.engine.resume();
    }

    /// Ingests every open batch now.
    pub fn seal_batches(&self) {
        self.service.engine.seal_all();
    }

    /// Creates a table, or creates it anew and empty.
    ///
    /// # Errors
    ///
    /// A type that does not exist, or a mapping that does not fit the columns.
    pub fn create_table(&self, options: &TableOptions) -> Result<(), String> {
        self.service.catalog.create_table(options)
    }

    /// Whether there was such a table. Its database stays.
    pub fn drop_table(&self, database: &str, table: &str) -> bool {
        self.service.catalog.drop_table(database, table)
    }

    /// # Errors
    ///
    /// No such table, or a mapping that does not fit its columns.
    pub fn create_mapping(
        &self,
        database: &str,
        table: &str,
        name: &str,
        text: &str,
    ) -> Result<(), String> {
        self.service
            .catalog
            .create_mapping(database, table, name, text)
    }

    /// Whether there was such a mapping.
    pub fn drop_mapping(&self, database: &str, table: &str, name: &str) -> bool {
        self.service.catalog.drop_mapping(database, table, name)
    }
}

impl Drop for Standin {
    fn drop(&mut self) {
        self.engine.abort();
    }
}

fn control_router(service: &Arc<Service>) -> Router {
    Router::new()
        .route("/{tenant}/oauth2/v2.0/token", post(identity::token))
        .route("/metadata/identity/oauth2/token", get(identity::imds))
        .route("/v1/rest/auth/metadata", get(mgmt::metadata))
        .route("/v1/rest/mgmt", post(mgmt::command))
        .route("/rows", get(pages::rows))
        .route("/failures", get(pages::failures))
        .route("/messages", get(pages::messages))
        .route("/state", get(pages::state))
        .with_state(service.clone())
}
