//! nbdcast: a network block device on several replicas that answers on the first durable copy.
//!
//! [`nbd`] speaks to clients, [`volume`] decides order and acknowledgements, [`runtime`] joins the two with the agents;
//! [`config`], [`cli`], [`admin`] and [`status`] are what a person meets; [`certs`] makes certificates.

pub mod admin;
pub mod certs;
pub mod cli;
pub mod config;
pub mod nbd;
pub mod runtime;
pub mod status;
pub mod volume;
