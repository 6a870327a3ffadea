//! Reloading: the file is read again, and the cores go on with what of it they can take over.
//!
//! Before it: SIGHUP ([`crate::cli`]), or `POST /reload` ([`crate::admin`]).
//! After it: every core goes by the new settings, or nothing has changed.
//! Thread: the uplink's runtime; files are read on threads that may block. Allocates: freely.
//! Invariant: one reload at a time; a file, or a secret that it names, that cannot be read or is not valid changes
//! nothing; an answer comes when all cores have changed, so a request that is sent after it meets the new settings.
//! Not here: which keys are taken over ([`crate::config::reload`]) and how a request meets them ([`crate::live`]).

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use crate::config::Config;
use crate::config::reload::{Reloaded, credential_key, principal_key};
use crate::error::Fatal;
use crate::live::{Settings, Swap};
use crate::tls::Tls;

/// Reads the configuration of a running node again.
pub struct Reloader {
    /// Nothing where the node was started without a file.
    file: OnceLock<PathBuf>,
    running: Mutex<Settings>,
    /// Held by the reload that is going on.
    turn: tokio::sync::Mutex<()>,
    cores: Vec<mpsc::Sender<Swap>>,
    metrics: Arc<ReloadMetrics>,
    tls: Arc<Tls>,
}

/// What reloads count.
#[derive(Debug)]
pub struct ReloadMetrics {
    pub applied: AtomicU64,
    /// The file was not valid.
    pub rejected: AtomicU64,
    /// When the configuration in use was read, in seconds since 1970.
    pub loaded_at: AtomicU64,
}

/// What a reload did; the keys are named as in [`Reloaded`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    pub reloaded: bool,
    /// Keys with a new value, credentials whose secrets are others, and `listener.tls` where certificates or keys are.
    pub changed: BTreeSet<String>,
    /// Keys whose new value waits for a restart.
    pub needs_restart: BTreeSet<String>,
}

impl ReloadMetrics {
    pub fn new() -> Self {
        ReloadMetrics {
            applied: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
            loaded_at: AtomicU64::new(now()),
        }
    }
}

impl Default for ReloadMetrics {
    fn default() -> Self {
        Self::new()
    }
}

fn now() -> u64 {
    u64::try_from(Timestamp::now().as_second()).unwrap_or(0)
}

impl Reloader {
    /// For a node that runs with `running`, on cores that listen to the other ends of `cores`.
    pub fn new(
        running: Settings,
        cores: Vec<mpsc::Sender<Swap>>,
        metrics: Arc<ReloadMetrics>,
        tls: Arc<Tls>,
    ) -> Self {
        Reloader {
            file: OnceLock::new(),
            running: Mutex::new(running),
            turn: tokio::sync::Mutex::new(()),
            cores,
            metrics,
            tls,
        }
    }

    /// Says which file the configuration came from.
    pub fn read_from(&self, file: PathBuf) {
        let set = self.file.set(file);
        assert!(set.is_ok(), "a node has one file");
    }

    /// What the node runs with.
    pub fn config(&self) -> Arc<Config> {
        self.running
            .lock()
            .expect("no holder panics")
            .config
            .clone()
    }

    /// Reads the file again. It has to be run to its end: see [`Reloader::spawn`].
    async fn reload(self: Arc<Self>) -> Result<Outcome, Fatal> {
        let _turn = self.turn.lock().await;
        let running = self.running.lock().expect("no holder panics").clone();
        let reader = self.clone();
        let read = tokio::task::spawn_blocking(move || reader.read(&running));
        let (settings, outcome) = match read.await.expect("reading does not panic") {
            Ok(read) => read,
            Err(fatal) => {
                self.metrics.rejected.fetch_add(1, Ordering::Relaxed);
                for line in fatal.report().lines() {
                    tracing::error!("not reloaded, and nothing has changed: {line}");
                }
                return Err(fatal);
            }
        };
        *self.running.lock().expect("no holder panics") = settings.clone();
        let mut taken = Vec::with_capacity(self.cores.len());
        for core in &self.cores {
            let (sender, receiver) = oneshot::channel();
            let swap = Swap {
                settings: settings.clone(),
                taken: sender,
            };
            // A core that is gone takes no requests either.
            if core.send(swap).await.is_ok() {
                taken.push(receiver);
            }
        }
        for taken in taken {
            let _ = taken.await;
        }
        self.metrics.applied.fetch_add(1, Ordering::Relaxed);
        self.metrics.loaded_at.store(now(), Ordering::Relaxed);
        tracing::info!(changed = ?outcome.changed, "reloaded");
        for key in &outcome.needs_restart {
            tracing::warn!("{key}: restart to apply");
        }
        Ok(outcome)
    }

    /// Reads the file again, whether or not somebody waits for the outcome.
    pub async fn spawn(self: Arc<Self>) -> Result<Outcome, Fatal> {
        let reloading = tokio::spawn(self.reload());
        reloading.await.expect("reloading does not panic")
    }

    fn read(&self, running: &Settings) -> Result<(Settings, Outcome), Fatal> {
        let path = self.file.get().ok_or(Fatal::NoConfigFile)?;
        let file = Config::load(path)?;
        for warning in file.warnings() {
            tracing::warn!("{warning}");
        }
        let Reloaded {
            config,
            mut changed,
            needs_restart,
        } = Reloaded::new(&running.config, &file);
        let settings = running.reload(config)?;
        for (index, principal) in settings.config.principals.iter().enumerate() {
            let secrets = settings.admission.secrets(index);
            let before = &running.config.principals;
            let before = before.iter().position(|known| known.name == principal.name);
            if let Some(before) = before
                && running.admission.secrets(before) != secrets
            {
                let key = credential_key(&principal.credential);
                changed.insert(format!("{}.{key}", principal_key(&principal.name)));
            }
        }
        // Last, as it takes effect at once.
        if self.tls.reload()? {
            changed.insert("listener.tls".to_owned());
        }
        let outcome = Outcome {
            reloaded: true,
            changed,
            needs_restart,
        };
        Ok((settings, outcome))
    }
}
