//! What a reload replaces while the node runs: routes, who may send, limits and deadlines.
//!
//! Before it: [`crate::config`] is valid, and for a reload [`crate::reload`] has kept from it what can be taken over.
//! After it: a request takes [`Live`] once and goes by it to its end; connections take from it what is not a request's.
//! Thread: [`Settings`] are made off the cores; each core makes a [`Live`] of its own of them.
//! Allocates: at start and at a reload; a request clones an `Rc`.
//! Invariant: a request is admitted, routed and stored under one `Live`, also where the next one has come meanwhile; the
//! indexes of routes, principals and listeners are of one `Live`, those of tables and listeners of all of them.
//! Not here: which keys a reload takes over ([`crate::config::reload`]).

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::admission::Admission;
use crate::config::Config;
use crate::error::Fatal;
use crate::route::Routes;

/// What the cores have in common of it. Whatever is read from a file besides the configuration is read here, at start
/// and at each reload alike: an error then leaves everything as it was.
#[derive(Clone)]
pub struct Settings {
    /// Counts the reloads before these.
    pub generation: u64,
    pub config: Arc<Config>,
    /// Shared by the cores, so that a rate is the node's.
    pub admission: Arc<Admission>,
}

impl Settings {
    pub fn load(config: Arc<Config>) -> Result<Self, Fatal> {
        let admission = Arc::new(Admission::load(&config)?);
        Ok(Self {
            generation: 0,
            config,
            admission,
        })
    }

    /// Those that follow these; secrets are read again.
    pub fn reload(&self, config: Config) -> Result<Self, Fatal> {
        let admission = Arc::new(self.admission.reload(&self.config, &config)?);
        let config = Arc::new(config);
        Ok(Self {
            generation: self.generation + 1,
            config,
            admission,
        })
    }
}

/// One core's.
pub struct Live {
    /// Of the settings. Who keeps an index of one `Live` looks by this whether it is still good.
    pub generation: u64,
    pub config: Arc<Config>,
    pub routes: Routes,
    pub admission: Arc<Admission>,
}

impl Live {
    pub fn new(settings: &Settings) -> Self {
        Self {
            generation: settings.generation,
            config: settings.config.clone(),
            routes: Routes::new(&settings.config),
            admission: settings.admission.clone(),
        }
    }
}

/// New settings for a core, which says when it goes by them.
pub struct Swap {
    pub settings: Settings,
    pub taken: oneshot::Sender<()>,
}
