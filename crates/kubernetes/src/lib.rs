//! The Kubernetes secrets keychain: pull secrets of the cluster, listed and watched through a kubeconfig.
//!
//! It is a crate of its own so that only the daemon builds the Kubernetes client. What it needs of the cluster is the
//! permission to `list` and `watch` secrets, nothing else; what it keeps of a secret is its namespace, its name and the
//! entries of its `auths`. Nothing named inside a secret is ever run.
//!
//! | file | idea |
//! | --- | --- |
//! | `settings` | what the daemon tells it |
//! | `kubeconfig` | which file is used, and what it refers to |
//! | `exec` | exec plugins, with a deadline |
//! | `proxy` | through which proxy |
//! | `connect` | from a kubeconfig to a client |
//! | `watch` | connect, follow all that is to be synced, connect anew |
//! | `selection` | list and watch one part of it |
//! | `failure`, `back_off` | what the server did wrong, what is done about it, and how long that waits |
//! | `answer` | what comes back for one request |
//! | `reading` | answers, within bounds and wiped |
//! | `object`, `secret` | a secret on the wire, and its entries |
//! | `matching` | which key speaks for which image |
//! | `store`, `ranked` | the index behind a lookup, and who comes first in it |
//! | `change` | for which registries a change is news |
//! | `synced` | what is known and what is wrong, between the sync and lookups |
//! | `keychain` | the option |

mod answer;
mod back_off;
mod change;
mod connect;
mod exec;
mod failure;
#[doc(hidden)]
pub mod fuzzing;
mod keychain;
mod kubeconfig;
mod matching;
mod object;
mod proxy;
mod ranked;
mod reading;
mod secret;
mod selection;
mod settings;
mod store;
mod synced;
mod watch;

pub use keychain::SecretsKeychain;
pub use proxy::Proxies;
pub use settings::{Environment, Settings, Timing};
pub use synced::Progress;
